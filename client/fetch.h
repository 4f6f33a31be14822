#ifndef MODELSTATE_CLIENT_FETCH_H_
#define MODELSTATE_CLIENT_FETCH_H_

#include <functional>

#include "absl/status/status.h"
#include "client/client.h"
#include "client/connection.h"
#include "common/wire/tensor_receiver.h"
#include "modelstate/v1/state.pb.h"

namespace modelstate::client {

// One StreamStateDict from its request to its end. `on_header` sees the header before the table,
// and may refuse. `receiver` is fresh and keeps what is known of the tensors, also when the stream
// breaks. OK only when the whole stream arrived and every digest agreed, or it said not_modified.
// Internal to the library.
absl::Status ReceiveStateDict(const Connection& connection,
                              const v1::StreamStateDictRequest& request,
                              const std::function<absl::Status(const v1::Header&)>& on_header,
                              TensorReceiver* receiver, Cancellation* cancellation);

}  // namespace modelstate::client

#endif  // MODELSTATE_CLIENT_FETCH_H_
