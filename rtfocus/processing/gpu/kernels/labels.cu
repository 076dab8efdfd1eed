// Labels: logits of a classifier to level, confidence and defocus per tile
// (rtfocus.processing.classifier).

// One thread per tile of the grid; the network may give more rows and columns.
// Background has the level `background`. The defocus is the mean over the chosen
// level and its neighbours by their probabilities, the uncertainty the deviation of
// all levels from it; both NaN for background. `turn` -1 turns the sign.
extern "C" __global__ void decode_labels(
    const float* logits,
    int labels,
    int network_rows,
    int network_columns,
    int rows,
    int columns,
    const short* levels,
    int background,
    int turn,
    float step_um,
    const unsigned char* empty,
    float* defocus_um,
    float* confidence,
    float* uncertainty_um,
    short* level) {
  int tile = element();
  if (tile >= rows * columns) return;
  long long plane = (long long)network_rows * network_columns;
  const float* found =
      logits + (long long)(tile / columns) * network_columns + tile % columns;
  int best = 0;
  for (int label = 1; label < labels; ++label)
    if (found[label * plane] > found[best * plane]) best = label;
  float highest = found[best * plane], total = 0.0f, all = 0.0f;
  float near = 0.0f, weighted = 0.0f;
  for (int label = 0; label < labels; ++label) {
    float share = expf(found[label * plane] - highest);
    total += share;
    if (levels[label] == background) continue;
    all += share;
    if (abs(levels[label] - levels[best]) > 1) continue;
    near += share;
    weighted += share * levels[label];
  }
  float defocus = weighted / fmaxf(near, 1.17549435e-38f), variance = 0.0f;
  for (int label = 0; label < labels; ++label) {
    if (levels[label] == background) continue;
    float away = levels[label] - defocus;
    variance += expf(found[label * plane] - highest) * away * away;
  }
  variance /= fmaxf(all, 1.17549435e-38f);
  bool nothing = empty[tile] || levels[best] == background;
  float unknown = __uint_as_float(0x7fc00000u);
  confidence[tile] = 1.0f / total;
  level[tile] = nothing ? (short)background : (short)(turn * levels[best]);
  defocus_um[tile] = nothing ? unknown : turn * defocus * step_um;
  uncertainty_um[tile] = nothing ? unknown : sqrtf(variance) * step_um;
}
