"""torch's fused optimizers on a GPU, for comparison with cuda_optimizer_bench; same table."""

import sys

try:
    import torch
except ImportError:
    print("skipped: no torch")
    sys.exit(0)
if not torch.cuda.is_available():
    print("skipped: no CUDA device")
    sys.exit(0)

MANY = 100_000
free, _ = torch.cuda.mem_get_info()
parameters = 1 << 30
while parameters * 16 + (1 << 30) > free:
    parameters //= 2
print(f"torch {torch.__version__}, {torch.cuda.get_device_name()}, {parameters} parameters")


def measure(name, make, tensors, bytes_per_parameter, repeat=7):
    each = parameters // tensors // 8 * 8
    values = torch.full((parameters,), 1e-2, device="cuda")
    gradients = torch.full((parameters,), 1e-3, device="cuda")
    parts = []
    for t in range(tensors):
        part = values[t * each : (t + 1) * each].detach().requires_grad_()
        part.grad = gradients[t * each : (t + 1) * each]
        parts.append(part)
    optimizer = make(parts)
    times = []
    for i in range(repeat + 2):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        optimizer.step()
        end.record()
        torch.cuda.synchronize()
        if i >= 2:
            times.append(begin.elapsed_time(end))
    ms = sorted(times)[len(times) // 2]
    rate = bytes_per_parameter * each * tensors / ms / 1e6
    what = f"torch fused {name}, {tensors} tensor{'s' if tensors > 1 else ''}: step"
    print(f"| {what:58} | {ms:10.3f} | {rate:8.1f} |  |", flush=True)


many = int(sys.argv[1]) if len(sys.argv) > 1 else MANY
for tensors in (1, many):
    measure("AdamW", lambda p: torch.optim.AdamW(p, fused=True), tensors, 28)
    measure("Adam", lambda p: torch.optim.Adam(p, fused=True), tensors, 28)
    measure("SGD momentum", lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9, fused=True), tensors, 20)
