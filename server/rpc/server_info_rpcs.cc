#include "absl/strings/str_cat.h"
#include "common/format/checkpoint_reader.h"
#include "common/wire/convert.h"
#include "server/rpc/service.h"

namespace modelstate {

void ModelStateService::GetServerInfo(UnaryCall* call, const v1::GetServerInfoRequest*,
                                      v1::GetServerInfoResponse* response) {
  call->AnswerNow([&] {
    response->set_version(MODELSTATE_VERSION);
    response->set_incarnation(runtime_.incarnation);
    for (const std::unique_ptr<Device>& device : runtime_.devices) {
      const BufferPool::Usage usage = device->pool()->usage();
      v1::DeviceInfo* info = response->add_devices();
      info->set_name(device->name());
      info->set_memory_limit_bytes(usage.limit_bytes);
      info->set_memory_used_bytes(usage.used_bytes);
      info->set_memory_pooled_bytes(usage.pooled_bytes);
    }
    const ModuleEnvironment& environment = runtime_.registry->environment();
    v1::Limits* limits = response->mutable_limits();
    limits->set_max_message_bytes(runtime_.max_message_bytes);
    limits->set_max_chunk_bytes(runtime_.max_chunk_bytes);
    limits->set_push_memory_limit_bytes(environment.push_budget->limit());
    limits->set_push_memory_used_bytes(environment.push_budget->used());
    limits->set_snapshot_memory_limit_bytes(environment.snapshot_budget->limit());
    limits->set_snapshot_memory_used_bytes(environment.snapshot_budget->used());
    DurationToProto(runtime_.pins->max_lease(), limits->mutable_max_lease());
    DurationToProto(runtime_.stream_stall_timeout, limits->mutable_stream_stall_timeout());
    uint64_t held_versions = 0;
    for (const auto& device : runtime_.devices) held_versions += device->holds()->held_versions();
    limits->set_held_versions(held_versions);
    limits->set_pins(runtime_.pins->size());
    limits->set_max_workers(environment.workers.max_workers);
    DurationToProto(environment.workers.expiry, limits->mutable_worker_expiry());
    limits->set_running_calls(runtime_.calls.running());
    for (CheckpointFormat format : kAllCheckpointFormats) {
      response->add_checkpoint_formats(CheckpointFormatName(format));
    }
    response->add_checkpoint_formats(kDirectoryFormat);
    for (Algorithm algorithm : AllAlgorithms()) {
      response->add_optimizers(AlgorithmName(algorithm));
    }
    TimeToProto(runtime_.start_time, response->mutable_start_time());
    response->set_module_count(runtime_.registry->size());
    if (runtime_.saver->period().enabled()) {
      const PeriodicSaver::Counts counts = runtime_.saver->counts();
      v1::PeriodicSaves* saves = response->mutable_periodic_saves();
      saves->set_saved(counts.saved);
      saves->set_failed(counts.failed);
      saves->set_last_error(counts.last_error);
    }
    return absl::OkStatus();
  });
}

}  // namespace modelstate
