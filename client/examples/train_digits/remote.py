"""A torch.nn.Module whose weights live on a model-state server, over plain gRPC stubs.

The stubs are generated from proto/ when this is imported; a program of your own would rather run protoc once.
"""

import os
import sys
import tempfile
import time

import grpc
import torch
from grpc_tools import protoc

PROTO = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "..", "..", "proto")


def generate_stubs():
    out = tempfile.mkdtemp()
    folder = os.path.join(PROTO, "modelstate", "v1")
    files = [os.path.join(folder, name) for name in sorted(os.listdir(folder)) if name.endswith(".proto")]
    well_known = os.path.join(os.path.dirname(protoc.__file__), "_proto")
    if protoc.main(["protoc", "-I" + PROTO, "-I" + well_known, "--python_out=" + out, "--grpc_python_out=" + out] + files):
        raise RuntimeError("protoc failed")
    sys.path.insert(0, out)


generate_stubs()
from modelstate.v1 import module_pb2, service_pb2_grpc, state_pb2, step_pb2, types_pb2  # noqa: E402

DTYPES = {torch.float32: types_pb2.F32, torch.int64: types_pb2.I64}
TORCH_DTYPES = {value: key for key, value in DTYPES.items()}
CHUNK_BYTES = 1 << 20  # a message stays below the 4 MiB that gRPC accepts


def connect(address):
    return service_pb2_grpc.ModelStateStub(grpc.insecure_channel(address))


def raw(tensor):
    """The elements as they lie in memory."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def register(stub, name, module):
    """Makes the server's module: parameters and buffers of `module` with their values."""
    spec = module_pb2.ModuleSpec()
    parameters = dict(module.named_parameters())
    for key, tensor in module.state_dict().items():
        spec.tensors.add(name=key, kind=types_pb2.PARAMETER if key in parameters else types_pb2.BUFFER,
                         dtype=DTYPES[tensor.dtype], shape=tensor.shape, values=types_pb2.Values(raw=raw(tensor)))
    return stub.CreateModule(module_pb2.CreateModuleRequest(name=name, spec=spec))


def fetch(stub, name, module):
    """Loads the newest state_dict into `module`; returns its version and step."""
    header, table, region, whole = None, [], bytearray(), False
    for part in stub.StreamStateDict(state_pb2.StreamStateDictRequest(module=name)):
        kind = part.WhichOneof("part")
        if kind == "header":
            header = part.header
            region = bytearray(header.total_bytes)
        elif kind == "tensors":
            table.extend(part.tensors.tensors)
        elif kind == "chunk":
            region[part.chunk.offset:part.chunk.offset + len(part.chunk.data)] = part.chunk.data
        else:
            whole = True
    if not whole:
        raise RuntimeError("the stream was cut: it has no trailer")
    module.load_state_dict({
        info.name: torch.frombuffer(region, dtype=TORCH_DTYPES[info.dtype], offset=info.offset,
                                    count=info.nbytes // TORCH_DTYPES[info.dtype].itemsize).reshape(tuple(info.shape))
        for info in table})
    return header.version, header.step


def push_parts(header, module):
    """The messages of a push: header, table, chunks, trailer. Gradients, and the buffers as they are after forward()."""
    table, region = types_pb2.TensorTable(), bytearray()
    gradients = [(key, types_pb2.GRADIENT, p.grad) for key, p in module.named_parameters() if p.grad is not None]
    buffers = [(key, types_pb2.BUFFER, b) for key, b in module.named_buffers()]
    for key, kind, tensor in gradients + buffers:
        data = raw(tensor)
        table.tensors.add(name=key, kind=kind, dtype=DTYPES[tensor.dtype], shape=tensor.shape, offset=len(region),
                          nbytes=len(data))
        region += data
    header.tensor_count, header.total_bytes = len(table.tensors), len(region)
    yield step_pb2.StepPart(header=header)
    yield step_pb2.StepPart(tensors=table)
    for offset in range(0, len(region), CHUNK_BYTES):
        data = bytes(region[offset:offset + CHUNK_BYTES])
        yield step_pb2.StepPart(chunk=types_pb2.Chunk(offset=offset, data=data))
    yield step_pb2.StepPart(trailer=types_pb2.Trailer(total_bytes=len(region)))


def push(stub, name, module, worker, sequence, base, attempts=20):
    """One worker's part of a step; returns when the round has closed. Sent again where the answer was lost: the server
    knows the step by (worker, sequence) and applies it once."""
    for attempt in range(attempts):
        header = step_pb2.StepHeader(module=name, worker=worker, sequence=sequence, base=base, wait=True)
        try:
            return stub.ApplyStep(push_parts(header, module))
        except grpc.RpcError as error:
            if error.code() != grpc.StatusCode.UNAVAILABLE or attempt + 1 == attempts:
                raise
            time.sleep(min(0.1 * 2**attempt, 5))
