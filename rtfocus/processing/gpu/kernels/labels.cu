// Labels: logits of a classifier to level, confidence and defocus per tile
// (rtfocus.processing.classify).

// One thread per tile of the grid; the network may give more rows and columns.
// Background has the level `background`. First it is decided whether there is
// anything to correct, then which label of that side is likeliest. The defocus is the mean over the chosen
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
  float highest = found[0], total = 0.0f, idle = 0.0f;
  for (int label = 1; label < labels; ++label)
    highest = fmaxf(highest, found[label * plane]);
  for (int label = 0; label < labels; ++label) {
    float share = expf(found[label * plane] - highest);
    total += share;
    if (levels[label] == 0 || levels[label] == background) idle += share;
  }
  bool is_idle = idle >= 0.5f * total;
  int best = -1;
  for (int label = 0; label < labels; ++label) {
    if ((levels[label] == 0 || levels[label] == background) != is_idle) continue;
    if (best < 0 || found[label * plane] > found[best * plane]) best = label;
  }
  best = max(best, 0);  // no side has a label only where logits are NaN
  float all = 0.0f, near = 0.0f, weighted = 0.0f;
  for (int label = 0; label < labels; ++label) {
    if (levels[label] == background) continue;
    float share = expf(found[label * plane] - highest);
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
  confidence[tile] = expf(found[best * plane] - highest) / total;
  level[tile] = nothing ? (short)background : (short)(turn * levels[best]);
  defocus_um[tile] = nothing ? unknown : turn * defocus * step_um;
  uncertainty_um[tile] = nothing ? unknown : sqrtf(variance) * step_um;
}

// One block: what the labels found in a frame, as the two entries of its condition
// (rtfocus.processing.classify, level_of_frame). Tiles likelier background have no say.
extern "C" __global__ void tell_level(
    const float* logits,
    int labels,
    int tiles,
    const short* levels,
    int background,
    int defocus_levels,
    int defocus_known,
    float* condition) {
  double all = 0.0, distance = 0.0, lean = 0.0;
  for (int tile = (int)threadIdx.x; tile < tiles; tile += (int)blockDim.x) {
    const float* found = logits + tile;
    float highest = found[0], total = 0.0f, seen = 0.0f, far = 0.0f, side = 0.0f;
    for (int label = 1; label < labels; ++label)
      highest = fmaxf(highest, found[(long long)label * tiles]);
    for (int label = 0; label < labels; ++label) {
      float share = expf(found[(long long)label * tiles] - highest);
      total += share;
      if (levels[label] == background) continue;
      seen += share;
      far += share * abs(levels[label]);
      side += share * levels[label];
    }
    if (!(seen > 0.5f * total)) continue;
    all += seen / total;
    distance += far / total;
    lean += side / total;
  }
  all = block_sum(all);
  distance = block_sum(distance);
  lean = block_sum(lean);
  if (threadIdx.x != 0 || all == 0.0) return;
  condition[defocus_levels] = (float)((lean < 0.0 ? -distance : distance) / all);
  condition[defocus_known] = 1.0f;
}

// What a column of the condition holds.
#define ENTRY_FIXED 0
#define ENTRY_LEVEL 1
#define ENTRY_DEFOCUS_LEVELS 2
#define ENTRY_DEFOCUS_KNOWN 3

// One thread per tile of a restorer: its condition (tile, entry), from the mean
// defocus of the labels around it, those out of focus by their confidence
// (rtfocus.processing.classify). The tables hold the labels near every row and
// column of tiles.
extern "C" __global__ void tile_conditions(
    const short* level,
    const float* confidence,
    const float* defocus_um,
    int label_columns,
    int background,
    const Span* rows,
    const Span* columns,
    int tiles,
    int tile_columns,
    const int* kinds,
    const float* fixed,
    int entries,
    float levels_per_um,
    float farthest,
    int signed_levels,
    int hides_defocus,
    float* condition) {
  int tile = element();
  if (tile >= tiles) return;
  int row = tile / tile_columns, column = tile % tile_columns;
  float total = 0.0f, weighted = 0.0f;
  for (int y = rows[row].first; y <= rows[row].last; ++y)
    for (int x = columns[column].first; x <= columns[column].last; ++x) {
      int label = y * label_columns + x;
      if (level[label] == 0 || level[label] == background) continue;
      total += confidence[label];
      weighted += confidence[label] * defocus_um[label];
    }
  bool known = total > 0.0f;
  float levels = known ? weighted / total * levels_per_um : 0.0f;
  float whole = fminf(fmaxf(rintf(levels), -farthest), farthest);
  if (!signed_levels) whole = fabsf(whole);
  bool told = known && !hides_defocus;
  for (int entry = 0; entry < entries; ++entry) {
    float value = fixed[entry];
    if (kinds[entry] == ENTRY_LEVEL) value = whole;
    if (kinds[entry] == ENTRY_DEFOCUS_LEVELS) value = told ? levels : 0.0f;
    if (kinds[entry] == ENTRY_DEFOCUS_KNOWN) value = told ? 1.0f : 0.0f;
    condition[tile * entries + entry] = value;
  }
}
