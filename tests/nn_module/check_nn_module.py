"""Plays the same operations on a torch.nn.Module and on a module of the server, and compares their state after each.

Usage: check_nn_module.py BIN_DIRECTORY [ROW ...]
BIN_DIRECTORY holds modelstate-server. Needs torch (1.13 or newer), safetensors, numpy and grpcio-tools; not part of the
test suite, which needs no torch. Prints a line per row of docs/nn-module.md that it checks; exit 0 when all agree. A row
that this version of torch does not know is printed as skipped.
"""

import copy
import inspect
import os
import re
import sys

import torch
from safetensors.torch import load_file

import model_server
from model_server import Refused, Server, describe, registered, types_pb2

NEW_TORCH = hasattr(torch.nn.Module, "load_state_dict") and "assign" in inspect.signature(
    torch.nn.Module.load_state_dict).parameters


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(2, 4, 3, bias=False)
        self.bn = torch.nn.BatchNorm2d(4)
        self.register_parameter("absent", None)


class Net(torch.nn.Module):
    """Parameters and buffers of every kind that a module has, children before and after them, and a tied pair."""

    def __init__(self):
        super().__init__()
        self.block1 = Block()
        self.embedding = torch.nn.Embedding(6, 4)
        self.scale = torch.nn.Parameter(torch.tensor(1.5))
        self.register_buffer("table", torch.arange(6, dtype=torch.int64))
        self.register_buffer("mask", torch.tensor([True, False, True]), persistent=False)
        self.register_buffer("positions", torch.linspace(0, 1, 5, dtype=torch.float64))
        self.register_buffer("nothing", None)
        self.block2 = Block()
        self.decoder = torch.nn.Linear(4, 6, bias=False)
        self.decoder.weight = self.embedding.weight


def new_net(seed=0):
    torch.manual_seed(seed)
    net = Net()
    with torch.no_grad():
        for bn in (net.block1.bn, net.block2.bn):
            bn.running_mean.normal_()
            bn.running_var.uniform_(0.5, 2)
            bn.num_batches_tracked.fill_(seed + 3)
    return net


class Difference(Exception):
    pass


def expect(condition, what):
    if not condition:
        raise Difference(what)


def expect_equal(torch_has, server_has, what):
    expect(torch_has == server_has, "%s: torch has %r, the server %r" % (what, torch_has, server_has))


def named(module, kind):
    """named_parameters() or named_buffers(), each with and without duplicates."""
    seen, unique, every = set(), [], []
    for name, entry_kind, tensor, _ in registered(module):
        if entry_kind != kind:
            continue
        every.append(name)
        if id(tensor) not in seen:
            seen.add(id(tensor))
            unique.append(name)
    return unique, every


def compare(server, name, module, bits=True):
    """All that torch and the server can be asked for. `bits`: elements must be equal, not only near."""
    expect_equal([n for n, _ in module.named_parameters()], named(module, types_pb2.PARAMETER)[0], "our walk")
    for method, kind, torch_named in (("ListParameters", types_pb2.PARAMETER, module.named_parameters()),
                                      ("ListBuffers", types_pb2.BUFFER, module.named_buffers())):
        torch_named = list(torch_named)
        entries = server.listed(method, name, view=model_server.module_pb2.NAMED)
        expect_equal([n for n, _ in torch_named], [e.name for e in entries], method + " NAMED")
        for (key, tensor), entry in zip(torch_named, entries):
            expect_equal((model_server.DTYPES[tensor.dtype], tuple(tensor.shape)), (entry.dtype, tuple(entry.shape)), key)
            if kind == types_pb2.PARAMETER:
                expect_equal(tensor.requires_grad, entry.requires_grad, "requires_grad of " + key)
        expect_equal(named(module, kind)[1], [e.name for e in server.listed(method, name)], method)
        in_state_dict = [n for n, k, _, persistent in registered(module) if k == kind and persistent]
        expect_equal(in_state_dict, server.names(method, name, model_server.module_pb2.STATE_DICT), method + " STATE_DICT")

    torch_state, server_state = module.state_dict(), server.state_dict(name)
    expect_equal(list(torch_state), list(server_state), "keys of the state_dict, in order")
    compare_tensors(torch_state, server_state, bits)
    non_persistent = {n: t for n, _, t, persistent in registered(module) if not persistent}
    everything = server.state_dict(name, include_non_persistent=True)
    expect_equal(set(torch_state) | set(non_persistent), set(everything), "keys with non-persistent buffers")
    compare_tensors(non_persistent, {n: everything[n] for n in non_persistent}, bits)


def compare_tensors(torch_state, server_state, bits=True):
    for key, tensor in torch_state.items():
        dtype, shape, data = describe(tensor)
        expect_equal((dtype, shape), server_state[key][:2], "dtype and shape of " + key)
        if bits:
            expect(data == server_state[key][2], "elements of %s differ" % key)
        elif data:
            ours = torch.frombuffer(bytearray(server_state[key][2]), dtype=tensor.dtype).reshape(tensor.shape)
            near = torch.allclose(tensor.detach().double(), ours.double(), rtol=2e-6, atol=1e-7, equal_nan=True)
            expect(near, "elements of %s differ by more than rounding" % key)


def lines(text):
    """The parts of torch's load error, which both write as lines."""
    return [line.strip() for line in text.split("\n")[1:] if line.strip()]


def shortened(line):
    """The server names as many keys as fit, then says how many more there are."""
    return ", ".join(line.split(", ")[:5]) if line.count(", ") >= 8 else line.rstrip(" .")


def both_refuse(server, name, module, state, **options):
    """Both refuse to load `state`, in the same words; the server is as before."""
    before = (server.version(name), server.state_dict(name, include_non_persistent=True))
    try:
        copy.deepcopy(module).load_state_dict(state, **({"strict": options["strict"]} if "strict" in options else {}))
        raise Difference("torch loaded what should be refused")
    except RuntimeError as error:
        torch_text = str(error)
    try:
        server.load_state_dict(name, state, **options)
        raise Difference("the server loaded what torch refuses: " + torch_text)
    except Refused as error:
        server_text = str(error)
    said = [shortened(line) for line in lines(torch_text)]
    for line in said:
        expect(line in server_text, "torch says %r, the server %r" % (line, server_text))
    order = [server_text.index(line) for line in said]
    expect(order == sorted(order), "parts in another order: torch %r, the server %r" % (torch_text, server_text))
    expect_equal(before, (server.version(name), server.state_dict(name, include_non_persistent=True)), "unchanged")


def mapped(state, change):
    state = dict(state)
    change(state)
    return state


# One function per row of docs/nn-module.md; the docstring is the row.

def row_registration(server):
    """order of the state_dict, tied names, deduplicated listings, non-persistent buffers, absent entries"""
    net = new_net()
    server.create("registration", net)
    compare(server, "registration", net)


def row_registration_errors(server):
    """an empty name, a dot in a leaf name, a taken name, an integer parameter"""
    def torch_text(act):
        try:
            act()
        except (KeyError, TypeError, RuntimeError) as error:
            return str(error.args[0])
        raise Difference("torch takes it")

    def server_text(*tensors):
        spec = model_server.module_pb2.ModuleSpec()
        for name, kind, dtype in tensors:
            spec.tensors.add(name=name, kind=kind, dtype=dtype, shape=[2])
        try:
            server.call("CreateModule", model_server.module_pb2.CreateModuleRequest(name="wrong", spec=spec))
        except Refused as error:
            return str(error)
        raise Difference("the server takes %r" % (tensors,))

    parameter, buffer = types_pb2.PARAMETER, types_pb2.BUFFER
    value = torch.zeros(2)

    def twice(first, second):
        module = torch.nn.Module()
        first(module)
        second(module)

    pairs = [
        (lambda: torch.nn.Module().register_parameter("", torch.nn.Parameter(value)), [("", parameter, types_pb2.F32)]),
        (lambda: torch.nn.Module().register_buffer("", value), [("", buffer, types_pb2.F32)]),
        (lambda: twice(lambda m: m.register_parameter("a", torch.nn.Parameter(value)),
                       lambda m: m.register_buffer("a", value)),
         [("a", parameter, types_pb2.F32), ("a", buffer, types_pb2.F32)]),
        (lambda: twice(lambda m: m.register_parameter("a", torch.nn.Parameter(value)),
                       lambda m: m.add_module("a", torch.nn.Linear(1, 1))),
         [("a", parameter, types_pb2.F32), ("a.weight", parameter, types_pb2.F32)]),
        (lambda: torch.nn.Parameter(torch.zeros(2, dtype=torch.int64)), [("a", parameter, types_pb2.I64)]),
    ]
    for act, tensors in pairs:
        ours = server_text(*tensors)
        theirs = torch_text(act)
        # 1.13 says "can require gradients", newer ones the same; names in quotes are the full ones here.
        expect(theirs.rstrip(".").lower() in ours.lower(), "torch says %r, the server %r" % (theirs, ours))
    # A dot parts the modules of a full name here, so that a leaf with a dot cannot be said.
    expect("can't contain" in torch_text(lambda: torch.nn.Module().register_buffer("a.b", value)), "torch takes a dot")


def row_freezing(server):
    """requires_grad_ by names, prefixes and globs; never a buffer; a frozen parameter is still a parameter"""
    net = new_net()
    server.create("freezing", net)
    for prefix, flag in (("block1.", False), ("", False), ("block2.bn.", True), ("", True), ("embedding.", False)):
        for name, parameter in net.named_parameters():
            if name.startswith(prefix):
                parameter.requires_grad_(flag)
        server.freeze("freezing", flag, **({"prefixes": [prefix]} if prefix else {"globs": ["*"]}))
        compare(server, "freezing", net)
    try:
        server.freeze("freezing", False, names=["block1.bn.running_mean"])
        raise Difference("a buffer was frozen")
    except Refused as error:
        expect_equal("NOT_A_PARAMETER", error.reason, "freezing a buffer by name")


def row_strict_load(server):
    """load_state_dict, strict: all keys; missing, unexpected and mismatched ones refused in torch's words"""
    net, other = new_net(), new_net(1)
    server.create("strict", net)
    net.load_state_dict(other.state_dict())
    server.load_state_dict("strict", dict(other.state_dict()))
    compare(server, "strict", net)
    state = dict(other.state_dict())
    both_refuse(server, "strict", net, mapped(state, lambda s: s.pop("block1.conv.weight")))
    both_refuse(server, "strict", net, mapped(state, lambda s: s.update(extra=torch.zeros(2))))
    both_refuse(server, "strict", net, mapped(state, lambda s: s.update({"block1.bn.bias": torch.zeros(5)})))
    both_refuse(server, "strict", net, mapped(state, lambda s: (
        s.pop("block1.conv.weight"), s.pop("scale"), s.update(extra=torch.zeros(2), more=torch.zeros(1)),
        s.update({"table": torch.zeros(2, 3)}))))
    both_refuse(server, "strict", net, mapped(state, lambda s: s.update(mask=torch.tensor([True] * 3))))


def row_not_strict_load(server):
    """strict=False: the rest is loaded and the two lists come back; a size mismatch is an error still"""
    net, other = new_net(), new_net(1)
    server.create("lenient", net)
    state = mapped(other.state_dict(), lambda s: (s.pop("scale"), s.pop("block2.bn.running_var"),
                                                  s.update(extra=torch.zeros(2))))
    answer = net.load_state_dict(state, strict=False)
    ours = server.load_state_dict("lenient", state, strict=False)
    expect_equal(list(answer.missing_keys), list(ours.missing_keys), "missing_keys")
    expect_equal(list(answer.unexpected_keys), list(ours.unexpected_keys), "unexpected_keys")
    compare(server, "lenient", net)
    both_refuse(server, "lenient", net, mapped(state, lambda s: s.update(positions=torch.zeros(4))), strict=False)


def row_copy_casts(server):
    """a load copies: the module's dtype stays, elements are cast as torch casts them"""
    values = torch.tensor([0.0, -0.0, 1.5, -1.7, 2.5, 3.0e38, 1e-40, 65504.0, 65519.0, 65520.0, 1e30, 0.1, -3.9])
    odd = torch.tensor([float("nan"), float("inf"), float("-inf")] + [1.0] * 10)
    defined = torch.tensor([0.0, -0.0, 1.5, -1.7, 2.5, 3.9, 1e-40, 100.0, 99.5, 7.0, 8.0, 0.1, -3.9])
    for target in (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int8,
                   torch.bool):
        integer = not target.is_floating_point and target != torch.bool
        for source in ([defined] if integer else [values, odd, defined]):
            for source_dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
                incoming = source.to(source_dtype)
                module = torch.nn.Module()
                module.register_buffer("b", torch.zeros(13, dtype=target))
                server.create("cast", module)
                module.load_state_dict({"b": incoming})
                server.load_state_dict("cast", {"b": incoming})
                have, want = server.state_dict("cast")["b"], describe(module.b)
                if torch.isnan(incoming).any() and target.is_floating_point:  # which NaN is the processor's choice
                    ours = torch.frombuffer(bytearray(have[2]), dtype=target)
                    expect(torch.equal(torch.isnan(ours), torch.isnan(module.b)) and
                           torch.equal(ours.nan_to_num(7.0), module.b.nan_to_num(7.0)), "cast with NaN")
                else:
                    expect_equal(want, have, "%s to %s" % (source_dtype, target))
                server.call("DeleteModule", model_server.module_pb2.DeleteModuleRequest(module="cast"))


def row_assign(server):
    """assign=True takes the dtype that comes and keeps requires_grad"""
    if not NEW_TORCH:
        return "this torch has no assign"
    net, other = new_net(), new_net(1).to(torch.float16)
    net.scale.requires_grad_(False)
    server.create("assign", net)
    net.load_state_dict(other.state_dict(), assign=True)
    # assign gives each name a tensor of its own, so torch's module is no longer tied; the server's is.
    server.load_state_dict("assign", dict(other.state_dict()), assign=True)
    net.decoder.weight = net.embedding.weight
    compare(server, "assign", net)


def row_prefixes(server):
    """keys with "module." do not match by themselves; strip_prefix and add_prefix"""
    net, other = new_net(), new_net(1)
    server.create("prefix", net)
    wrapped = {"module." + key: value for key, value in other.state_dict().items()}
    both_refuse(server, "prefix", net, {k: v for k, v in wrapped.items() if "bn" in k and "num" not in k})
    net.load_state_dict(other.state_dict())
    server.load_state_dict("prefix", wrapped, strip_prefix="module.")
    compare(server, "prefix", net)
    block = new_net(2).block1
    net.block2.load_state_dict(block.state_dict())
    server.load_state_dict("prefix", dict(block.state_dict()), strict=False, add_prefix="block2.")
    compare(server, "prefix", net)


def row_batch_norm_of_old_files(server):
    """num_batches_tracked missing: fine without _metadata or for version < 2, and the count stays; else a missing key"""
    net, other = new_net(), new_net(1)
    server.create("old", net)
    old = mapped(other.state_dict(), lambda s: [s.pop(k) for k in list(s) if k.endswith("num_batches_tracked")])
    net.load_state_dict(old)
    server.load_state_dict("old", old)
    if NEW_TORCH:
        compare(server, "old", net)
    # 1.13 sets the count to 0 where 2.15, which the server follows, keeps it.
    kept = {k: v for k, v in new_net().state_dict().items() if k.endswith("num_batches_tracked")}
    compare_tensors(kept, server.state_dict("old"))

    versioned = other.state_dict()  # with _metadata, in which batch norm has version 2
    for key in [k for k in versioned if k.endswith("num_batches_tracked")]:
        del versioned[key]
    torch.save(versioned, os.path.join(server.root, "new.pth"))
    versioned._metadata["block1.bn"]["version"] = 1
    torch.save(versioned, os.path.join(server.root, "mixed.pth"))
    torch.save(old, os.path.join(server.root, "old.pth"))
    for path, missing in (("old.pth", []), ("mixed.pth", ["block2.bn.num_batches_tracked"]),
                          ("new.pth", ["block1.bn.num_batches_tracked", "block2.bn.num_batches_tracked"])):
        state = torch.load(os.path.join(server.root, path))
        theirs = copy.deepcopy(net).load_state_dict(state, strict=False).missing_keys
        expect_equal(missing, theirs, "what torch misses in " + path)
        ours = server.load_checkpoint("old", path, strict=False)
        expect_equal(missing, list(ours.missing_keys), path)
        if missing:
            try:
                server.load_checkpoint("old", path)
                raise Difference(path + " was loaded")
            except Refused as error:
                expect_equal("MISSING_KEY", error.reason, path)


def row_scalars(server):
    """a module's scalar takes a checkpoint's [1]; a module's [1] does not take a scalar"""
    module = torch.nn.Module()
    module.register_parameter("s", torch.nn.Parameter(torch.tensor(1.0)))
    module.register_buffer("v", torch.ones(1))
    server.create("scalars", module)
    state = {"s": torch.tensor([5.0]), "v": torch.zeros(1)}
    module.load_state_dict(state)
    server.load_state_dict("scalars", state)
    compare(server, "scalars", module)
    if NEW_TORCH:  # 1.13 takes the first element of any 1-D tensor
        both_refuse(server, "scalars", module, {"s": torch.zeros(3), "v": torch.zeros(1)})
    both_refuse(server, "scalars", module, {"s": torch.tensor(2.0), "v": torch.tensor(3.0)})
    both_refuse(server, "scalars", module, {"s": torch.zeros(1, 1), "v": torch.zeros(1)})


def row_tied(server):
    """a tied pair is one storage with two names: a step updates it once, a load by either name fills both"""
    net = new_net()
    server.create("tied", net)
    configure(server, "tied", 0.5)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
    torch.manual_seed(5)
    step(server, "tied", net, optimizer, ["embedding.weight"])
    compare(server, "tied", net, bits=False)
    server.load_state_dict("tied", dict(net.state_dict()))
    # safetensors.torch.save_model keeps one name of a tied pair.
    state = mapped(new_net(1).state_dict(), lambda s: s.pop("decoder.weight"))
    net.load_state_dict(state, strict=False)
    server.load_state_dict("tied", state)
    compare(server, "tied", net)


def configure(server, name, lr, **hyperparameters):
    server.call("ConfigureOptimizer", model_server.step_pb2.ConfigureOptimizerRequest(
        module=name, optimizer=model_server.step_pb2.OptimizerConfig(
            algorithm=model_server.step_pb2.SGD,
            hyperparameters=model_server.step_pb2.Hyperparameters(lr=lr, **hyperparameters))))


def step(server, name, net, optimizer, names, **header):
    """The same gradients for both."""
    gradients = {n: torch.randn(p.shape).to(p.dtype) for n, p in net.named_parameters() if n in names}
    for parameter in net.parameters():
        parameter.grad = None
    for n, p in net.named_parameters():
        if n in gradients and p.requires_grad:
            p.grad = gradients[n].clone()
    optimizer.step()
    return server.step(name, gradients, **header)


def row_steps_and_freezing(server):
    """a step updates parameters only; freezing keeps optimizer state; a frozen parameter's gradient is refused"""
    net = new_net()
    server.create("steps", net)
    configure(server, "steps", 0.1, momentum=0.9, weight_decay=0.01)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    torch.manual_seed(6)
    every = [n for n, _ in net.named_parameters()]
    for _ in range(3):
        step(server, "steps", net, optimizer, every)
        compare(server, "steps", net, bits=False)
    net.block1.requires_grad_(False)
    server.freeze("steps", False, prefixes=["block1."])
    before = server.version("steps")
    try:
        server.step("steps", {"block1.conv.weight": torch.zeros(4, 2, 3, 3)})
        raise Difference("a gradient for a frozen parameter was taken")
    except Refused as error:
        expect_equal("PARAMETER_FROZEN", error.reason, "a gradient for a frozen parameter")
    try:
        server.step("steps", {"block2.bn.running_mean": torch.zeros(4)})
        raise Difference("a gradient for a buffer was taken")
    except Refused as error:
        expect_equal("NOT_A_PARAMETER", error.reason, "a gradient for a buffer")
    expect_equal(before, server.version("steps"), "version after refused steps")
    for _ in range(2):
        answer = step(server, "steps", net, optimizer, every, ignore_frozen=True)
        expect_equal(len(list(net.block1.parameters())), answer.ignored, "ignored gradients")
        compare(server, "steps", net, bits=False)
    net.block1.requires_grad_(True)
    server.freeze("steps", True, prefixes=["block1."])
    for _ in range(2):  # the momentum of block1 is that from before it was frozen
        step(server, "steps", net, optimizer, every)
        compare(server, "steps", net, bits=False)


def row_buffer_writes(server):
    """buffers are written by a partial load, and travel in the state_dict"""
    net = new_net()
    server.create("buffers", net)
    torch.manual_seed(8)
    net.train()
    net.block2.bn(torch.randn(3, 4, 5, 5))
    state = {k: v for k, v in net.state_dict().items() if k.startswith("block2.bn.") and ("running" in k or "num" in k)}
    answer = server.load_state_dict("buffers", state, strict=False)
    expect_equal(3, answer.loaded, "loaded")
    compare(server, "buffers", net)


def row_to_dtype(server):
    """.to(dtype) casts floating-point parameters and buffers, leaves integers, keeps ties and requires_grad"""
    net = new_net()
    net.scale.requires_grad_(False)
    server.create("to", net)
    for dtype in (torch.bfloat16, torch.float32, torch.float64, torch.float16, torch.float32):
        net.to(dtype)
        server.call("MoveModule", model_server.module_pb2.MoveModuleRequest(module="to", dtype=model_server.DTYPES[dtype]))
        compare(server, "to", net)
    before = server.version("to")
    server.call("MoveModule", model_server.module_pb2.MoveModuleRequest(module="to", device="cpu:1"))
    compare(server, "to", net)
    expect_equal(before + 1, server.version("to"), "version after a move")
    try:
        net.to(torch.int64)
        raise Difference("torch casts to int64")
    except TypeError as error:
        theirs = str(error)
    try:
        server.call("MoveModule", model_server.module_pb2.MoveModuleRequest(module="to", dtype=types_pb2.I64))
        raise Difference("the server casts to I64")
    except Refused as error:
        expect(theirs in str(error), "torch says %r, the server %r" % (theirs, error))


def row_optimizer_moves_too(server):
    """steps after .to() go on with the optimizer's state"""
    net = new_net()
    server.create("moved", net)
    configure(server, "moved", 0.1, momentum=0.9)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    torch.manual_seed(9)
    every = [n for n, _ in net.named_parameters()]
    for device in ("cpu", "cpu:1", "cpu"):
        server.call("MoveModule", model_server.module_pb2.MoveModuleRequest(module="moved", device=device))
        for _ in range(2):
            step(server, "moved", net, optimizer, every)
            compare(server, "moved", net, bits=False)


def row_save(server):
    """a saved checkpoint is the state_dict: both names of a tie or its alias, no non-persistent buffer"""
    net = new_net(4)
    server.create("saved", net)
    server.call("SaveCheckpoint", model_server.checkpoint_pb2.SaveCheckpointRequest(module="saved", path="saved"))
    state = load_file(os.path.join(server.root, "saved", "model.safetensors"))
    expect("mask" not in state, "a non-persistent buffer was saved")
    missing = set(net.state_dict()) - set(state)
    expect(missing <= {"decoder.weight"}, "not in the file: %r" % missing)
    compare_tensors({k: v for k, v in net.state_dict().items() if k in state}, {k: describe(v) for k, v in state.items()})
    server.call("CreateModule", model_server.module_pb2.CreateModuleRequest(name="again"))
    server.load_checkpoint("again", "saved")
    expect_equal(list(net.state_dict()), list(server.state_dict("again")), "keys after a load into an empty module")
    compare_tensors(net.state_dict(), server.state_dict("again"))


def row_numbers(server):
    """min, max, mean, norm and non-finite count are torch's; elements by index as in Python"""
    torch.manual_seed(11)
    module = torch.nn.Module()
    module.register_buffer("x", torch.randn(5, 7, 3))
    module.register_buffer("narrow", torch.randn(64).half())
    module.register_buffer("n", torch.randint(-100, 100, (4, 6)))
    server.create("numbers", module)
    for name, tensor in module.named_buffers():
        answer = server.call("GetTensor", model_server.module_pb2.GetTensorRequest(module="numbers", name=name))
        numbers, x = answer.statistics, tensor.double()
        for ours, theirs in ((numbers.min, x.min()), (numbers.max, x.max()), (numbers.mean, x.mean()),
                             (numbers.norm, x.norm())):
            expect(abs(ours - theirs.item()) <= 1e-9 * max(1, abs(ours)), "statistics of " + name)
    for text in ("0", "-1", "1, 2", "..., 0", "::2, 1:5", "1:4, -3:, ::2", "2, 3, 1", ":, 1:2", "..., -1", "-2:, ..., 1:"):
        theirs = eval("module.x[%s]" % text)  # the scripted text above
        answer = server.call("GetTensor", model_server.module_pb2.GetTensorRequest(
            module="numbers", name="x", slice=text))
        expect_equal(list(theirs.shape), list(answer.slice_shape), "shape of x[%s]" % text)
        values = answer.tensor.values.doubles.values
        expect_equal(theirs.double().reshape(-1).tolist()[:64], list(values), "x[%s]" % text)
    for text in ("5", "0, 0, 0, 0", "::0"):
        try:
            eval("module.x[%s]" % text)
            raise Difference("torch takes x[%s]" % text)
        except (IndexError, ValueError):
            pass
        try:
            server.call("GetTensor", model_server.module_pb2.GetTensorRequest(module="numbers", name="x", slice=text))
            raise Difference("the server takes x[%s]" % text)
        except Refused:
            pass


def main():
    rows = {name[4:]: function for name, function in globals().items() if name.startswith("row_")}
    chosen = sys.argv[2:] or list(rows)
    print("torch", re.sub(r"\+.*", "", torch.__version__))
    failures = 0
    with Server(sys.argv[1], "--device=cpu,cpu:1") as server:
        for name in chosen:
            try:
                skipped = rows[name](server)
                print("%-9s %s: %s" % ("skipped" if skipped else "same", name, skipped or rows[name].__doc__))
            except (Difference, Refused) as difference:
                failures += 1
                print("DIFFERENT %s: %s" % (name, difference))
    print("%d rows, %d different" % (len(chosen), failures))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
