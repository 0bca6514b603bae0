"""Scripts that measure, and the kernels that exist because of what they measured."""
