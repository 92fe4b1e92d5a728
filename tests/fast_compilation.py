"""XLA_FLAGS for processes that run a few steps: compiling takes nearly all of their time."""

FAST_COMPILATION = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
