#include <modelstate/client/client.h>
#include <modelstate/client/files/fetch_to_file.h>

#include <iostream>

// Succeeds when the library links, runs, and says that nobody listens on port 1.
int main() {
  modelstate::ClientOptions options;
  options.connect_timeout = absl::Milliseconds(200);
  const absl::StatusOr<modelstate::Client> client =
      modelstate::Client::Connect("localhost:1", options);
  std::cout << client.status() << "\n";
  if (client.ok()) return modelstate::client::FetchToFile(*client, "m", "m.safetensors").ok();
  return absl::IsUnavailable(client.status()) ? 0 : 1;
}
