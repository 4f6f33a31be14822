# CUDA for -DMODELSTATE_CUDA=ON: a local toolkit where there is one, else NVIDIA's wheels under
# build/tools/cuda. The runtime is linked statically: one program runs with and without a driver.

# The rest of what the compilers know: "75;80;86;89;90;100;120".
set(MODELSTATE_CUDA_ARCHITECTURES "80;90" CACHE STRING
  "Compute capabilities to compile for, each with PTX, as CMAKE_CUDA_ARCHITECTURES takes them")

if(NOT CMAKE_CUDA_COMPILER)
  find_program(MODELSTATE_NVCC nvcc
    HINTS ENV CUDACXX ENV CUDA_HOME ENV CUDA_PATH
    PATHS /usr/local/cuda PATH_SUFFIXES bin)
  if(NOT MODELSTATE_NVCC)
    execute_process(COMMAND ${PROJECT_SOURCE_DIR}/tools/install_cuda_toolkit.sh
      OUTPUT_VARIABLE toolkit OUTPUT_STRIP_TRAILING_WHITESPACE COMMAND_ERROR_IS_FATAL ANY)
    set(MODELSTATE_NVCC ${toolkit}/bin/nvcc CACHE FILEPATH "The CUDA compiler" FORCE)
  endif()
  set(CMAKE_CUDA_COMPILER ${MODELSTATE_NVCC})
endif()
set(CMAKE_CUDA_HOST_COMPILER ${CMAKE_CXX_COMPILER} CACHE FILEPATH "What nvcc compiles host code with")
set(CMAKE_CUDA_ARCHITECTURES ${MODELSTATE_CUDA_ARCHITECTURES})
set(CMAKE_CUDA_RUNTIME_LIBRARY None)  # modelstate::cudart is linked where it is used
enable_language(CUDA)
if(NOT CMAKE_CUDA20_STANDARD_COMPILE_OPTION)  # CMake 3.25 does not know it of nvcc
  set(CMAKE_CUDA20_STANDARD_COMPILE_OPTION -std=c++20)
  set(CMAKE_CUDA20_EXTENSION_COMPILE_OPTION -std=c++20)
endif()
set(CMAKE_CUDA_STANDARD 20)
set(CMAKE_CUDA_STANDARD_REQUIRED ON)
set(CMAKE_CUDA_EXTENSIONS OFF)

# FindCUDAToolkit of CMake 3.25 fails with CUDA 13, which lacks libraries that nothing here uses.
cmake_path(GET CMAKE_CUDA_COMPILER PARENT_PATH MODELSTATE_CUDA_BIN)
find_path(MODELSTATE_CUDA_INCLUDE_DIR cuda_runtime_api.h
  HINTS ${MODELSTATE_CUDA_BIN}/../include ${CMAKE_CUDA_TOOLKIT_INCLUDE_DIRECTORIES} REQUIRED)
find_library(MODELSTATE_CUDART_STATIC cudart_static
  HINTS ${MODELSTATE_CUDA_BIN}/../lib64 ${MODELSTATE_CUDA_BIN}/../lib REQUIRED)
add_library(modelstate_cudart INTERFACE)
add_library(modelstate::cudart ALIAS modelstate_cudart)
target_include_directories(modelstate_cudart SYSTEM INTERFACE ${MODELSTATE_CUDA_INCLUDE_DIR})
target_link_libraries(modelstate_cudart INTERFACE
  ${MODELSTATE_CUDART_STATIC} Threads::Threads ${CMAKE_DL_LIBS} rt)

# Same input, same bits: the arithmetic of the CPU's loops. The defaults are said too, since the
# results rest on them. (-Wno-parentheses: nvcc hands the host compiler some of its own.)
add_library(modelstate_cuda_flags INTERFACE)
target_include_directories(modelstate_cuda_flags INTERFACE ${PROJECT_SOURCE_DIR})
target_compile_options(modelstate_cuda_flags INTERFACE
  $<$<COMPILE_LANGUAGE:CUDA>:--fmad=false -prec-div=true -prec-sqrt=true -ftz=false
    --expt-relaxed-constexpr -Werror=all-warnings
    -Xcompiler=-Wall,-Wextra,-Wno-parentheses,-ffp-contract=off>)
