#!/usr/bin/env bash
# Shows that check.sh sees each kind of violation: seeds one at a time into a tree of its own.
set -uo pipefail
here=$(dirname "$(readlink -f "$0")")
tree=$(mktemp -d)
trap 'rm -rf "$tree"' EXIT
failures=0

clean_tree() {
  rm -rf "${tree:?}"/*
  mkdir -p "$tree"/{common/base,common/wire,server/state,server/rpc,server/optim/cuda,client/cli}
  echo '#include "absl/strings/str_cat.h"' >"$tree/common/base/shape.h"
  echo '#include "modelstate/v1/types.pb.h"' >"$tree/common/wire/convert.h"
  echo '#include "common/base/shape.h"' >"$tree/server/state/snapshot.cc"
  echo '#include <grpcpp/grpcpp.h>' >"$tree/server/rpc/handler.cc"
  echo '#include "server/optim/rules.h"' >"$tree/server/optim/cuda/step.cu"
  echo '#include "client/client.h"' >"$tree/client/cli/main.cc"
}

# seeded FILE LINE TEXT: with LINE appended to FILE, check.sh must fail and say FILE and TEXT.
seeded() {
  local file=$1 line=$2 text=$3 output
  clean_tree
  mkdir -p "$(dirname "$tree/$file")"
  printf '%b\n' "$line" >>"$tree/$file"
  if output=$("$here/check.sh" "$tree"); then
    echo "NOT SEEN: $file with: $line"
  elif ! grep -F "$file" <<<"$output" | grep -qF "$text"; then
    echo "SEEN, BUT NOT AS '$text': $file: $output"
  else
    return
  fi
  failures=$((failures + 1))
}

clean_tree
"$here/check.sh" "$tree" || { echo 'the clean tree does not pass'; failures=1; }

seeded common/base/shape.h '#include "server/state/snapshot.h"' 'common/base may not include server/state'
seeded common/base/shape.h '#include "common/format/reader.h"' 'may not include common/format'
seeded common/base/shape.h '#include <grpcpp/grpcpp.h>' 'may not include grpcpp'
seeded common/format/a.cc '#include "modelstate/v1/types.pb.h"' 'may not include generated'
seeded server/state/snapshot.cc '#include "modelstate/v1/state.pb.h"' 'may not include generated'
seeded server/state/snapshot.cc '  #  include "common/wire/convert.h"' 'may not include common/wire'
seeded server/state/snapshot.cc '#include "server/module/registry.h"' 'may not include server/module'
seeded server/optim/plan.cc '#include "server/checkpoint/save_job.h"' 'may not include server/checkpoint'
seeded server/checkpoint/a.cc '#include "server/optim/plan.h"' 'may not include server/optim'
seeded server/rpc/handler.cc '#include "client/client.h"' 'may not include client'
seeded client/client.cc '#include "server/rpc/server.h"' 'client may not include server/rpc'
seeded client/types.h '#include <grpcpp/channel.h>' 'may not include grpcpp'
seeded client/types.h '#include "client/connection.h"' 'which is not public'
seeded client/files/fetch_file.cc '#include "modelstate/v1/state.pb.h"' 'may not include generated'
seeded client/client.cc '#include "common/format/safetensors_writer.h"' 'client may not include common/format'
seeded client/cli/main.cc '#include "modelstate/v1/types.pb.h"' 'client/cli may not include generated'
seeded common/base/shape.h '#include "tests/fake_clock.h"' 'is in no layer'
seeded common/base/shape.h '#include "dtype.h"' 'from the repository root'
seeded common/base/shape.h '#include "../base/dtype.h"' 'from the repository root'
seeded server/state/fill.cu 'int x;' 'outside server/device/cuda'
seeded server/optim/cuda/step.cu '#include "absl/status/status.h"' 'a .cu file includes absl'
seeded server/state/snapshot.cc '#ifdef MODELSTATE_CUDA' 'a GPU switch'
seeded server/state/long.h "$(printf 'x\\n%.0s' {1..301})" '302 lines, the limit is 300'
seeded server/state/long.cc "$(printf 'x\\n%.0s' {1..651})" '652 lines, the limit is 650'
seeded common/loose.cc 'int x;' 'in no layer'
seeded docs/guide.md "see $(printf '/%s/x' work)" 'a path of one machine'
rm -rf "${tree:?}"/*
if "$here/check.sh" "$tree" >/dev/null; then
  echo 'an empty tree passes'
  failures=$((failures + 1))
fi

echo "$failures of the seeded violations went unseen"
[ "$failures" -eq 0 ]
