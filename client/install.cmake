# What `cmake --install` puts in place for find_package(modelstate): component "client".
include(CMakePackageConfigHelpers)
include(GNUInstallDirs)

foreach(target base proto wire format client client_files)
  set_target_properties(modelstate_${target} PROPERTIES EXPORT_NAME ${target})
  install(TARGETS modelstate_${target} EXPORT modelstateTargets
    ARCHIVE DESTINATION ${CMAKE_INSTALL_LIBDIR} COMPONENT client)
endforeach()

set(package_dir ${CMAKE_INSTALL_LIBDIR}/cmake/modelstate)
install(EXPORT modelstateTargets NAMESPACE modelstate:: DESTINATION ${package_dir} COMPONENT client)
configure_package_config_file(${PROJECT_SOURCE_DIR}/cmake/modelstateConfig.cmake.in
  ${CMAKE_CURRENT_BINARY_DIR}/modelstateConfig.cmake INSTALL_DESTINATION ${package_dir})
write_basic_package_version_file(${CMAKE_CURRENT_BINARY_DIR}/modelstateConfigVersion.cmake
  COMPATIBILITY SameMinorVersion)
install(FILES ${CMAKE_CURRENT_BINARY_DIR}/modelstateConfig.cmake
  ${CMAKE_CURRENT_BINARY_DIR}/modelstateConfigVersion.cmake
  DESTINATION ${package_dir} COMPONENT client)

# Headers keep their paths below include/modelstate, where they find each other.
set(include_dir ${CMAKE_INSTALL_INCLUDEDIR}/modelstate)
install(FILES client.h module_types.h state_dict.h types.h worker.h DESTINATION ${include_dir}/client COMPONENT client)
install(FILES files/compare.h files/fetch_to_file.h files/follow_file.h files/spec_file.h files/tensor_file.h
  files/tensor_source.h
  DESTINATION ${include_dir}/client/files COMPONENT client)
install(DIRECTORY ${PROJECT_SOURCE_DIR}/common/base/ DESTINATION ${include_dir}/common/base
  COMPONENT client FILES_MATCHING PATTERN "*.h")
install(TARGETS modelstate_cli RUNTIME DESTINATION ${CMAKE_INSTALL_BINDIR} COMPONENT cli)
