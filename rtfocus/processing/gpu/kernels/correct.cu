// Correct: camera counts to a signal proportional to light, and back
// (rtfocus.processing.camera).

// signal = (counts - offset) / divisor; flags[0] becomes 1 where any pixel is
// saturated. `divisor` (flat field, mean 1) has one value per pixel, or one per
// element where `divisor_channels` is that of the frame; 0: no flat field.
extern "C" __global__ void to_signal(
    const void* frame,
    int kind,
    int elements,
    int channels,
    float offset,
    float saturation,
    const float* divisor,
    int divisor_channels,
    float* signal,
    int* flags) {
  int i = element();
  if (i >= elements) return;
  float counts = load(frame, kind, i);
  if (counts >= saturation) flags[0] = 1;
  float value = counts - offset;
  if (divisor_channels == channels) value /= divisor[i];
  else if (divisor_channels == 1) value /= divisor[i / channels];
  signal[i] = value;
}

// frame = signal + offset; flags[1] becomes 1 where any value is NaN or infinite.
extern "C" __global__ void to_counts(
    const float* signal,
    int elements,
    float offset,
    void* frame,
    int kind,
    int* flags) {
  int i = element();
  if (i >= elements) return;
  float value = signal[i];
  if (!(fabsf(value) <= 3.402823466e38f)) flags[1] = 1;
  store(frame, kind, i, value + offset);
}
