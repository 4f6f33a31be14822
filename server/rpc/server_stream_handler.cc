#include "server/rpc/server_stream_handler.h"

namespace modelstate {

void ServerStreamHandler::Wake() {
  const RefPtr<ServerStreamHandler> self = Share();
  if (turns_.fetch_add(1) == 0) RunTurns();  // else whoever is at it takes this turn too
}

void ServerStreamHandler::RunTurns() {
  do {
    TakeTurn();
  } while (turns_.fetch_sub(1) != 1);
}

void ServerStreamHandler::TakeTurn() {
  if (ended_ || writing_.load(std::memory_order_acquire)) return;
  grpc::ByteBuffer message;
  absl::Status status = refused_;
  const Turn turn = refused_.ok() ? Next(&message, &status) : Turn::kEnd;
  if (turn == Turn::kMessage) {
    writing_.store(true, std::memory_order_release);
    call_.Write(message);
    Prefetch();
  } else if (turn == Turn::kEnd) {
    ended_ = true;
    call_.Finish(status);
  }
}

void ServerStreamHandler::BecomeGone() {
  gone_.store(true, std::memory_order_release);
  OnCallerGone();
}

void ServerStreamHandler::OnMessage(grpc::ByteBuffer* message) {
  const RefPtr<ServerStreamHandler> self = Share();
  refused_ = OnRequest(message);
  RunTurns();
}

void ServerStreamHandler::OnEnd() {
  const RefPtr<ServerStreamHandler> self = Share();
  refused_ = absl::InvalidArgumentError("the call ended without its request message");
  RunTurns();
}

void ServerStreamHandler::OnWritten(bool ok) {
  if (!ok) BecomeGone();
  writing_.store(false, std::memory_order_release);
  Wake();
}

void ServerStreamHandler::OnGone() {
  BecomeGone();
  Wake();
}

}  // namespace modelstate
