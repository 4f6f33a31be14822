"""The problem: handwritten digits of 8 x 8 pixels (scikit-learn ships 1,797) and a small CNN with BatchNorm."""

import sklearn.datasets
import torch

BATCH = 64
TRAIN = 1437  # the rest is the test set


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = torch.nn.Conv2d(1, 16, 3, padding=1, bias=False)
        self.bn1 = torch.nn.BatchNorm2d(16)
        self.conv2 = torch.nn.Conv2d(16, 32, 3, padding=1, bias=False)
        self.bn2 = torch.nn.BatchNorm2d(32)
        self.fc = torch.nn.Linear(32 * 2 * 2, 10)

    def forward(self, x):
        x = torch.nn.functional.max_pool2d(torch.relu(self.bn1(self.conv1(x))), 2)
        x = torch.nn.functional.max_pool2d(torch.relu(self.bn2(self.conv2(x))), 2)
        return self.fc(x.flatten(1))


def new_net():
    torch.manual_seed(0)
    return Net()


class Data:
    def __init__(self):
        digits = sklearn.datasets.load_digits()
        images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
        labels = torch.tensor(digits.target, dtype=torch.int64)
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(1))
        self.train, self.test = order[:TRAIN], order[TRAIN:]
        self.images, self.labels = images, labels

    def steps_per_epoch(self):
        return TRAIN // BATCH

    def shard(self, step, worker, workers):
        """Worker's part of the batch of a step: the same whoever asks."""
        epoch, batch = divmod(step, self.steps_per_epoch())
        order = torch.randperm(TRAIN, generator=torch.Generator().manual_seed(2 + epoch))
        rows = self.train[order[batch * BATCH:(batch + 1) * BATCH]][worker::workers]
        return self.images[rows], self.labels[rows]

    def accuracy(self, net):
        net.eval()
        with torch.no_grad():
            right = net(self.images[self.test]).argmax(1) == self.labels[self.test]
        net.train()
        return int(right.sum()), len(self.test)


def loss_and_gradients(net, images, labels):
    """Leaves the gradients in `net`, and its BatchNorm statistics moved on by this batch."""
    net.train()
    net.zero_grad()
    loss = torch.nn.functional.cross_entropy(net(images), labels)
    loss.backward()
    return loss.item()
