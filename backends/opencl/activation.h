// The activations of kernels/glu.py for a float type: -DSILU, -DGELU_TANH and -DGELU_ERF number them.
#define ACTIVATION(T)                                                                        \
  inline T activation(T x, int kind) {                                                       \
    if (kind == GELU_TANH) /* arXiv:1606.08415 */                                            \
      return 0.5f * x * (1.0f + tanh(0.7978845608028654f * (x + 0.044715f * x * x * x)));    \
    if (kind == GELU_ERF) return 0.5f * x * (1.0f + erf(x * 0.7071067811865476f));           \
    return x / (1.0f + exp(-x));                                                             \
  }
