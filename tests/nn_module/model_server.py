"""A model-state server and a plain gRPC client of it, for scripts that compare it with PyTorch.

Needs torch, numpy and grpcio-tools: the stubs are generated from proto/ when this is imported.
"""

import json
import os
import subprocess
import sys
import tempfile

import grpc
import torch
from grpc_tools import protoc

_REPOSITORY = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
_PROTO = os.path.join(_REPOSITORY, "proto")


def _generate():
    out = tempfile.mkdtemp()
    files = [os.path.join(_PROTO, "modelstate", "v1", name) for name in os.listdir(os.path.join(_PROTO, "modelstate", "v1"))
             if name.endswith(".proto")]
    include = os.path.join(os.path.dirname(protoc.__file__), "_proto")
    if protoc.main(["protoc", "-I" + _PROTO, "-I" + include, "--python_out=" + out, "--grpc_python_out=" + out] + files):
        raise RuntimeError("protoc failed")
    sys.path.insert(0, out)


_generate()
from modelstate.v1 import checkpoint_pb2, module_pb2, service_pb2_grpc, state_pb2, step_pb2, types_pb2  # noqa: E402

DTYPES = {
    torch.float64: types_pb2.F64, torch.float32: types_pb2.F32, torch.float16: types_pb2.F16,
    torch.bfloat16: types_pb2.BF16, torch.int64: types_pb2.I64, torch.int32: types_pb2.I32,
    torch.int16: types_pb2.I16, torch.int8: types_pb2.I8, torch.uint8: types_pb2.U8, torch.bool: types_pb2.BOOL,
    torch.complex64: types_pb2.C64,
}
TORCH_DTYPES = {value: key for key, value in DTYPES.items()}


def raw(tensor):
    """The elements as they lie in memory."""
    flat = tensor.detach().contiguous().reshape(-1)
    return bytes(flat.view(torch.uint8).numpy().tobytes()) if flat.numel() else b""


def describe(tensor):
    return (DTYPES[tensor.dtype], tuple(tensor.shape), raw(tensor))


def registered(module, prefix=""):
    """Every registered (full name, kind, tensor, persistent) in the order of a state_dict: each module's parameters,
    then its buffers, then its children."""
    for name, parameter in module._parameters.items():
        if parameter is not None:
            yield prefix + name, types_pb2.PARAMETER, parameter, True
    for name, buffer in module._buffers.items():
        if buffer is not None:
            yield prefix + name, types_pb2.BUFFER, buffer, name not in module._non_persistent_buffers_set
    for name, child in module._modules.items():
        if child is not None:
            yield from registered(child, prefix + name + ".")


def spec_of(module):
    """The ModuleSpec that registers what the module has, with its values."""
    spec = module_pb2.ModuleSpec()
    owners = {}
    for name, kind, tensor, persistent in registered(module):
        info = spec.tensors.add(name=name)
        if id(tensor) in owners:
            info.alias_of = owners[id(tensor)]
            continue
        owners[id(tensor)] = name
        info.kind, info.dtype = kind, DTYPES[tensor.dtype]
        info.shape.extend(tensor.shape)
        info.values.raw = raw(tensor)
        if kind == types_pb2.PARAMETER:
            info.requires_grad = tensor.requires_grad
        else:
            info.persistent = persistent
    return spec


def parts_of(part, header, tensors):
    """The messages of an upload: header, table, a chunk per tensor, trailer."""
    table, chunks, offset = types_pb2.TensorTable(), [], 0
    for name, tensor in tensors.items():
        data = raw(tensor)
        table.tensors.add(name=name, dtype=DTYPES[tensor.dtype], shape=tensor.shape, offset=offset, nbytes=len(data))
        if data:
            chunks.append(types_pb2.Chunk(offset=offset, data=data))
        offset += len(data)
    header.tensor_count, header.total_bytes = len(tensors), offset
    yield part(header=header)
    yield part(tensors=table)
    for chunk in chunks:
        yield part(chunk=chunk)
    yield part(trailer=types_pb2.Trailer(total_bytes=offset))


class Refused(Exception):
    """An answer that is an error; `reason` is that of its ErrorInfo."""

    def __init__(self, error):
        super().__init__(error.details())
        self.code = error.code()
        self.reason = ""
        for key, value in error.trailing_metadata() or ():
            if key == "grpc-status-details-bin":
                text = value.decode("latin-1")
                self.reason = next((word for word in REASONS if word in text), "")


REASONS = ("MISSING_KEY", "UNKNOWN_KEY", "SHAPE_MISMATCH", "DTYPE_MISMATCH", "INVALID_FIELD", "NOT_A_PARAMETER",
           "PARAMETER_FROZEN", "NOT_FOUND")


class Server:
    """modelstate-server in a process of its own, over a checkpoint root that goes with it."""

    def __init__(self, binaries, *flags):
        self.root = tempfile.mkdtemp()
        self.process = subprocess.Popen(
            [os.path.join(binaries, "modelstate-server"), "--listen=127.0.0.1:0", "--checkpoint_root=" + self.root,
             *flags], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        self.target = self.process.stdout.readline().split()[-1]
        self.stub = service_pb2_grpc.ModelStateStub(grpc.insecure_channel(self.target))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.terminate()
        self.process.wait()

    def call(self, method, request):
        try:
            answer = getattr(self.stub, method)(request)
            return answer if hasattr(answer, "DESCRIPTOR") else list(answer)
        except grpc.RpcError as error:
            raise Refused(error) from None

    def create(self, name, module, **fields):
        return self.call("CreateModule", module_pb2.CreateModuleRequest(name=name, spec=spec_of(module), **fields))

    def names(self, method, module, view):
        answer = self.call(method, module_pb2.ListTensorsRequest(module=module, view=view))
        return [tensor.name for tensor in answer.tensors]

    def listed(self, method, module, view=0):
        answer = self.call(method, module_pb2.ListTensorsRequest(module=module, view=view))
        return list(answer.tensors)

    def state_dict(self, module, **selection):
        """Name -> (dtype, shape, bytes), in the order of the stream; tied names carry their owner's bytes."""
        request = state_pb2.StreamStateDictRequest(module=module, selection=types_pb2.Selection(**selection))
        tensors, region, whole = [], bytearray(), False
        for part in self.call("StreamStateDict", request):
            kind = part.WhichOneof("part")
            if kind == "header":
                region = bytearray(part.header.total_bytes)
            elif kind == "tensors":
                tensors.extend(part.tensors.tensors)
            elif kind == "chunk":
                region[part.chunk.offset:part.chunk.offset + len(part.chunk.data)] = part.chunk.data
            else:
                whole = True
        if not whole:
            raise RuntimeError("the stream has no trailer")
        return {t.name: (t.dtype, tuple(t.shape), bytes(region[t.offset:t.offset + t.nbytes])) for t in tensors}

    def load_state_dict(self, module, state, **options):
        """`state` is name -> tensor."""
        header = state_pb2.LoadHeader(module=module, options=state_pb2.LoadOptions(**options))
        return self.call("LoadStateDict", parts_of(state_pb2.LoadPart, header, state))

    def load_checkpoint(self, module, path, **options):
        request = checkpoint_pb2.LoadCheckpointRequest(module=module, path=path,
                                                       options=state_pb2.LoadOptions(**options))
        return self.call("LoadCheckpoint", request)[-1].result.load

    def step(self, module, gradients, **fields):
        header = step_pb2.StepHeader(module=module, **fields)
        return self.call("ApplyStep", parts_of(step_pb2.StepPart, header, gradients))

    def freeze(self, module, requires_grad, **selection):
        return self.call("SetRequiresGrad", module_pb2.SetRequiresGradRequest(
            module=module, selection=types_pb2.Selection(**selection), requires_grad=requires_grad))

    def version(self, module):
        return self.call("GetModule", module_pb2.GetModuleRequest(module=module)).version.number
