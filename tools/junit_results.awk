# Reads ctest's --output-junit file; prints `passed NAME`, `failed NAME` or `skipped NAME` per test.
# Markup inside a test's output is escaped there, so a line that begins with a tag is a tag.
# Skipped is only what skipped itself (a return code or a text of the test) or was disabled; a test
# that could not start (ctest calls that "notrun" too) has failed.

function attribute(line, key,   start, rest) {
  start = index(line, " " key "=\"")
  if (start == 0) return ""
  rest = substr(line, start + length(key) + 3)
  return substr(rest, 1, index(rest, "\"") - 1)
}

function finish() {
  if (name == "") return
  verdict = "failed"
  if (status == "run" && !failure) verdict = "passed"
  if (status == "disabled" || (status == "notrun" && chose_to_skip)) verdict = "skipped"
  print verdict " " name
  name = ""
}

/^[ \t]*<testcase / {
  finish()
  name = attribute($0, "name")
  status = attribute($0, "status")
  failure = chose_to_skip = 0
}
/^[ \t]*<failure/ { failure = 1 }
/^[ \t]*<skipped / {
  if (attribute($0, "message") ~ /^SKIP_(RETURN_CODE|REGULAR_EXPRESSION)/) chose_to_skip = 1
}
END { finish() }
