from fast_compilation import compile_fast  # noqa: F401
