# Third-party packages, warning flags, and the two functions that make this project's targets.

find_package(Threads REQUIRED)
find_package(Protobuf REQUIRED)
find_package(gRPC CONFIG REQUIRED)
find_package(absl CONFIG REQUIRED)
find_package(PkgConfig REQUIRED)
pkg_check_modules(xxhash REQUIRED IMPORTED_TARGET libxxhash)
pkg_check_modules(deflate REQUIRED IMPORTED_TARGET libdeflate)
find_package(nlohmann_json REQUIRED)
find_package(spdlog REQUIRED)
find_package(CLI11 REQUIRED)
find_path(RANDOM123_INCLUDE_DIR Random123/philox.h REQUIRED)  # headers alone: librandom123-dev

set(MODELSTATE_SANITIZE "" CACHE STRING "Sanitizers to build with, as in -fsanitize=")

# Same input, same bits: a compiler may not fuse a multiply and an add on its own.
add_library(modelstate_flags INTERFACE)
target_compile_options(modelstate_flags INTERFACE -Wall -Wextra -Werror -ffp-contract=off)
target_include_directories(modelstate_flags INTERFACE $<BUILD_INTERFACE:${PROJECT_SOURCE_DIR}>)
if(CMAKE_CXX_COMPILER_ID MATCHES Clang)
  target_compile_options(modelstate_flags INTERFACE -Wthread-safety)
endif()
if(MODELSTATE_SANITIZE)
  add_compile_options(-fsanitize=${MODELSTATE_SANITIZE} -fno-omit-frame-pointer)
  add_link_options(-fsanitize=${MODELSTATE_SANITIZE})
  # gcc takes std::optional for uninitialized where a sanitizer's checks hide its flag.
  if(CMAKE_CXX_COMPILER_ID STREQUAL GNU)
    add_compile_options(-Wno-maybe-uninitialized)
  endif()
  if(MODELSTATE_SANITIZE MATCHES thread)
    # gcc cannot model atomic_thread_fence under TSan; the only use is in asio's own code.
    add_compile_options(-Wno-tsan)
    # Every executable, and no library, brings its own view of what Abseil's and gRPC's locks order.
    target_sources(modelstate_flags INTERFACE
      $<$<STREQUAL:$<TARGET_PROPERTY:TYPE>,EXECUTABLE>:${PROJECT_SOURCE_DIR}/cmake/tsan_sync.cc>)
  endif()
endif()

# Coverage for libFuzzer in all code; the fuzz targets alone link its main.
if(MODELSTATE_FUZZ)
  add_compile_options(-fsanitize=fuzzer-no-link)
endif()

# modelstate_library(NAME SRCS a.cc ... DEPS target ...): one per folder, also known as modelstate::NAME.
function(modelstate_library name)
  cmake_parse_arguments(arg "" "" "SRCS;DEPS" ${ARGN})
  add_library(modelstate_${name} STATIC ${arg_SRCS})
  add_library(modelstate::${name} ALIAS modelstate_${name})
  target_link_libraries(modelstate_${name} PUBLIC ${arg_DEPS} PRIVATE $<BUILD_INTERFACE:modelstate_flags>)
  target_include_directories(modelstate_${name} PUBLIC
    $<BUILD_INTERFACE:${PROJECT_SOURCE_DIR}>
    $<INSTALL_INTERFACE:include>
    $<INSTALL_INTERFACE:include/modelstate>)
endfunction()

# modelstate_test(NAME SRCS a_test.cc ... DEPS target ...): a GoogleTest program; each case is one ctest test.
function(modelstate_test name)
  cmake_parse_arguments(arg "" "" "SRCS;DEPS" ${ARGN})
  add_executable(${name} ${arg_SRCS})
  target_link_libraries(${name} PRIVATE ${arg_DEPS} modelstate_flags GTest::gmock GTest::gtest_main)
  target_compile_definitions(${name} PRIVATE MODELSTATE_SOURCE_DIR="${PROJECT_SOURCE_DIR}")
  set_target_properties(${name} PROPERTIES RUNTIME_OUTPUT_DIRECTORY ${PROJECT_BINARY_DIR}/tests)
  gtest_discover_tests(${name} DISCOVERY_TIMEOUT 60 PROPERTIES TIMEOUT 300)
endfunction()
