"""What lets megatron-core and SGLang run without CUDA. Imports nothing of slime."""
