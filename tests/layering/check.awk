# Reads edges.txt, then source files named relative to the repository root; prints one line per
# include that the layers do not allow. Run by check.sh.

function layer_of(path,   best, candidate) {
  best = ""
  for (candidate in allowed)
    if (index(path, candidate "/") == 1 && length(candidate) > length(best)) best = candidate
  return best
}

function may_use(what) { return index(allowed[layer], " " what " ") && !(FILENAME in public) }

function complain(text) { print FILENAME ":" FNR ": " text }

function check_own(path,   target) {
  target = layer_of(path)
  if (target == "") {
    complain("\"" path "\" is in no layer of tests/layering/edges.txt")
  } else if (target != layer && index(allowed[layer], " " target " ") == 0) {
    complain(layer " may not include " target " (\"" path "\")")
  }
}

FILENAME ~ /edges\.txt$/ {
  if ($0 ~ /^#/ || NF == 0) next
  if ($1 == "public:") {
    for (i = 2; i <= NF; ++i) public[$i] = 1
    next
  }
  name = $1
  sub(/:$/, "", name)
  $1 = ""
  allowed[name] = $0 " "
  next
}

FNR == 1 {
  layer = layer_of(FILENAME)
  cuda = FILENAME ~ /\.cuh?$/
  if (layer == "") complain("in no layer of tests/layering/edges.txt")
}

# Whether nvcc is compiling is another thing: a rule that host and device share must ask it.
/^[ \t]*#[ \t]*if.*(CUDA|GPU)/ && !/__CUDACC__/ && FILENAME !~ /^server\/(device|optim)\/cuda\// {
  complain("a GPU switch in the preprocessor: choose the implementation by build target")
}

/^[ \t]*#[ \t]*include/ {
  line = $0
  sub(/^[ \t]*#[ \t]*include[ \t]*/, "", line)
  quoted = substr(line, 1, 1) == "\""
  path = substr(line, 2)
  sub(/[">].*/, "", path)
  if (path ~ /^(common|server|client|tests|bench)\//) {
    check_own(path)
    if ((FILENAME in public) && layer_of(path) == layer && !(path in public))
      complain("a public header may not include \"" path "\", which is not public")
  } else if (path ~ /\.pb\.h$/) {
    if (!may_use("proto")) complain(layer " may not include generated " path)
  } else if (path ~ /^(grpc|grpcpp|grpc\+\+)\// || path ~ /^google\/protobuf\//) {
    if (!may_use("grpc")) complain(layer " may not include " path)
  } else if (quoted && path !~ /\//) {
    complain("\"" path "\": include from the repository root, as \"common/base/shape.h\"")
  } else if (path ~ /^\.\.?\//) {
    complain("\"" path "\": include from the repository root, as \"common/base/shape.h\"")
  }
  if (cuda && path ~ /^(absl|google)\//) complain("a .cu file includes " path)
}
