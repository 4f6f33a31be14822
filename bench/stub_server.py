#!/usr/bin/env python3
"""The baseline of transfer_bench in Python: grpcio with generated stubs, the bytes of a file.

    python bench/stub_server.py FILE     # needs the stubs (bench/run.sh makes them) on PYTHONPATH
"""
import sys
from concurrent import futures

import grpc
from modelstate.v1 import service_pb2_grpc, state_pb2

CHUNK_BYTES = 1 << 20


class StubService(service_pb2_grpc.ModelStateServicer):
    def __init__(self, data):
        self.data = data

    def StreamStateDict(self, request, context):
        yield state_pb2.StatePart(header={"module": request.module, "total_bytes": len(self.data)})
        for offset in range(0, len(self.data), CHUNK_BYTES):
            chunk = self.data[offset:offset + CHUNK_BYTES]
            yield state_pb2.StatePart(chunk={"offset": offset, "data": chunk})
        yield state_pb2.StatePart(trailer={"total_bytes": len(self.data)})


def main():
    with open(sys.argv[1], "rb") as file:
        data = file.read()
    server = grpc.server(futures.ThreadPoolExecutor(max_workers=2))
    service_pb2_grpc.add_ModelStateServicer_to_server(StubService(data), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    print(f"listening on 127.0.0.1:{port}", flush=True)
    server.wait_for_termination()


if __name__ == "__main__":
    main()
