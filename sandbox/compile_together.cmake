# Part of a test host's CMake toolchain, and read at the end of llama.cpp's own project(): compiles the files of these
# libraries ten at a time. Most of what the compiler does there are the same headers and templates, over and over. CPU
# seconds without optimisation, one by one and together: common/ 220 and 67, tools/mtmd 75 and 20, tools/server 75 and 43;
# with -O1, src/ but its models, which llama.cpp compiles together itself: 126 and 66.
function(compile_together target)
    if(TARGET ${target})
        get_target_property(folder ${target} SOURCE_DIR)
        set_target_properties(${target} PROPERTIES UNITY_BUILD ON UNITY_BUILD_BATCH_SIZE 10)
        foreach(alone IN LISTS ARGN)
            set_source_files_properties(
                ${folder}/${alone} TARGET_DIRECTORY ${target} PROPERTIES SKIP_UNITY_BUILD_INCLUSION ON)
        endforeach()
    endif()
endfunction()

function(compile_core_together)
    if(TARGET llama)
        get_target_property(folder llama SOURCE_DIR)
        get_target_property(sources llama SOURCES)
        list(FILTER sources INCLUDE REGEX "^(llama|unicode).*\\.cpp$")
        list(TRANSFORM sources PREPEND ${folder}/)
        set_source_files_properties(${sources} TARGET_DIRECTORY llama PROPERTIES SKIP_UNITY_BUILD_INCLUSION OFF)
    endif()
endfunction()

cmake_language(DEFER CALL compile_core_together)
# After the library what does not compile with its neighbours, and fit.cpp, which a test changes.
cmake_language(DEFER CALL compile_together llama-common json.cpp fit.cpp)
cmake_language(DEFER CALL compile_together mtmd mtmd-helper.cpp mtmd-helper-gen.cpp)
cmake_language(DEFER CALL compile_together server-context)
cmake_language(DEFER CALL compile_together llama-server-impl)
