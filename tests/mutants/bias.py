"""Mutants of the biases."""

from tests.mutants.mutation import mutants_of

FUNCTIONS = [
    *mutants_of(
        "bias/offsets.py",
        "parity/test_lookhere.py parity/test_log_cpb.py parity/test_kerple.py parity/test_t5.py",
        [
            ("key minus query on grids", "function(offsets - offsets[-1] / 2)", "function(offsets[-1] / 2 - offsets)"),
            ("key minus query elsewhere", "return function(delta)", "return function(-delta)"),
            ("offsets off by one", "function(offsets - offsets[-1] / 2)", "function(offsets - offsets[-1] / 2 + 1)"),
            (
                "index of the other shape",
                "offset_index(queries.feat_shape, ",
                "offset_index(queries.feat_shape[::-1], ",
            ),
        ],
    ),
    *mutants_of(
        "bias/alibi.py",
        "parity/test_alibi.py",
        [
            ("slopes sorted", "torch.cat([powers(lower), ", "torch.cat([powers(lower).flip(0), "),
            (
                "slopes of 12 heads interpolated",
                "torch.cat([powers(lower), powers(2 * lower)[0::2][: num_heads - lower]])",
                "powers(num_heads)",
            ),
            ("the other slopes of the next power", "[0::2]", "[1::2]"),
            ("exponent off by one", "torch.arange(1, count + 1, ", "torch.arange(count, "),
            ("attraction to the distant", "return -slopes", "return slopes"),
            ("only backwards", "k[..., None, :]).abs()", "k[..., None, :]).clamp(min=0)"),
            (
                "grid of the other shape",
                "flat_index(keys.coords, keys.feat_shape)",
                "flat_index(keys.coords, keys.feat_shape[::-1])",
            ),
        ],
    ),
    *mutants_of(
        "bias/alibi2d.py",
        "parity/test_alibi.py",
        [
            ("Manhattan distance", "vector_norm(delta, dim", "vector_norm(delta, 1, dim"),
            ("squared distance", "dim=-1)  #", "dim=-1).square()  #"),
            ("attraction to the distant", "return -slopes", "return slopes"),
        ],
    ),
    *mutants_of(
        "bias/log_cpb.py",
        "parity/test_log_cpb.py",
        [
            ("natural logarithm", "torch.log2(1 + u.abs())", "torch.log(1 + u.abs())"),
            ("not divided by log2(8)", "u.abs()) / 3", "u.abs())"),
            ("without sign", "u.sign() * torch", "torch"),
            ("scale 8", "return 16 * run", "return 8 * run"),
            ("window for window - 1", "[max(size - 1, 1) for", "[size for"),
            ("NaN on an axis of one cell", "[max(size - 1, 1) for", "[size - 1 for"),
            ("window on its side", "for size in window]", "for size in window[::-1]]"),
            ("pretrained_window ignored", "self.pretrained_window or queries.feat_shape", "queries.feat_shape"),
        ],
    ),
    *mutants_of(
        "bias/lookhere.py",
        "parity/test_lookhere.py",
        [
            ("hidden keys seen", "-slopes * distance, HIDDEN", "-slopes * distance, -1.0"),
            ("mask sign", "-slopes * distance, HIDDEN", "-slopes * distance, -HIDDEN"),
            ("looking away", "dy, dx = -delta[..., :1], -delta[..., 1:]", "dy, dx = delta[..., :1], delta[..., 1:]"),
            ("axes swapped", "dy, dx = -delta[..., :1], -delta[..., 1:]", "dx, dy = -delta[..., :1], -delta[..., 1:]"),
            ("up is down", "(round(-math.sin(angle)), ", "(round(math.sin(angle)), "),
            ("either edge", "inside[0] & inside[1]", "inside[0] | inside[1]"),
            ("borders hidden", ">= -BORDER", "> BORDER"),
            ("slopes of layers with depth for depth - 1", "max(self.depth - 1, 1)", "self.depth"),
            ("slopes of layers reversed", "first, last = self.layer_slopes", "last, first = self.layer_slopes"),
            ("global slope forgotten", "self.global_slope * layer_slope *", "layer_slope *"),
            ("slopes of heads off by one", "[1 + j // 4 for", "[j // 4 for"),
            ("families equal from 12 heads on", "4 * (sets + (more > 0))", "4 * sets"),
        ],
    ),
    *mutants_of(
        "bias/kerple.py",
        "parity/test_kerple.py",
        [
            ("logarithm without one", "torch.log1p(r2 * distance)", "torch.log(r2 * distance + 1e-6)"),
            ("r1 inside", "torch.log1p(r2 * distance)", "torch.log1p(r1 * distance)"),
            ("presets swapped", 'if self.preset == "log" else', 'if self.preset == "power" else'),
            ("attraction to the distant", "return -r1 *", "return r1 *"),
            ("r2 not clamped", "SMALLEST, PRESETS[self.preset][2])", "SMALLEST, None)"),
            (
                "no gradient at the clamp",
                "parameter + (parameter.clamp(low, high) - parameter).detach()",
                "parameter.clamp(low, high)",
            ),
        ],
    ),
    *mutants_of(
        "bias/fire.py",
        "parity/test_fire.py",
        [
            ("not relative to the reach", "/ torch.log1p(c * normaliser)", "/ torch.log1p(c * threshold)"),
            ("logarithm without one", "torch.log1p(c * distance) /", "torch.log(c * distance + 1e-6) /"),
            ("reach with n for n - 1", "(size - 1 for size in feat_shape)", "(size for size in feat_shape)"),
            (
                "largest side for the diameter",
                "math.hypot(*(size - 1 for size in feat_shape))",
                "max(size - 1 for size in feat_shape)",
            ),
            ("sign of c matters", "c = c.abs().clamp", "c = c.clamp"),
        ],
    ),
    *mutants_of(
        "bias/t5.py",
        "parity/test_t5.py",
        [
            (
                "query minus key",
                "-delta[..., 0]) + self._lookup(columns, -delta[..., 1])",
                "delta[..., 0]) + self._lookup(columns, delta[..., 1])",
            ),
            ("rows and columns swapped", "rows, columns = self.rel", "columns, rows = self.rel"),
            ("edges of buckets", "right=True) + half", "right=False) + half"),
            ("distance zero with the keys behind", "(distance > 0)", "(distance >= 0)"),
            ("signs swapped", "half * (distance > 0)", "half * (distance < 0)"),
            ("exact buckets off by one", "range(1, exact)", "range(1, exact + 1)"),
            ("growth", "(1 / (half - exact))", "(1 / half)"),
            ("interpolated the wrong way", "(distance - below)", "(1 - distance + below)"),
        ],
    ),
]

TABLES = [
    *mutants_of(
        "bias/tables.py",
        "parity/test_relative_table.py",
        [
            ("MaxViT with Swin's sign", '"maxvit": Dialect(sign=-1)', '"maxvit": Dialect(sign=1)'),
            ("strides of the other axis", ", self.shape(window)).long()", ", self.shape(window)[::-1]).long()"),
            ("LeViT's stride", "else tuple(window)", "else tuple(window)[::-1]"),
            ("LeViT with a sign", "return delta.abs()", "return delta % torch.tensor(window)"),
            ("offsets off by one", "offset + (size - 1) for", "offset + size for"),
            ("LeViT not mirrored", "- (size - 1)).abs())", "- (size - 1)).abs().sort().values)"),
            ("LeViT mirrored on one axis", ".index_select(axis, (torch", ".index_select(0, (torch"),
            ("BEiT's rows forgotten", "new, old, mode), classes])", "new, old, mode), 0 * classes])"),
            ("BEiT's resizing", 'init_std=0.0, interpolation="geometric"', 'init_std=0.0, interpolation="bicubic"'),
            ("initial standard deviation", "init_std: float = 0.02", "init_std: float = 0.2"),
            ("LeViT cut at the wrong corner", "slice(size - 1, None) for", "slice(None, size) for"),
        ],
    ),
    *mutants_of(
        "bias/relative_table.py",
        "parity/test_relative_table.py",
        [
            ("class-token slots swapped", "to_patch, to_class, between = ", "to_class, to_patch, between = "),
            ("class-token slots rotated", "to_patch, to_class, between = ", "between, to_patch, to_class = "),
            (
                "stale index after resizing",
                'self.set_parameter("relative_position_bias_table", table)\n            self.reinit_buffers()',
                'self.set_parameter("relative_position_bias_table", table)',
            ),
            (
                "stale index in forward",
                "if not same_grid(feat_shape, self.feat_shape):",
                "if False:",
            ),
            ("table transposed", "index_select(1, index.flatten())", "index_select(1, index.t().flatten())"),
        ],
    ),
]

CONTEXTUAL = [
    *mutants_of(
        "bias/decomposed.py",
        "parity/test_decomposed.py",
        [
            ("key minus query on grids", "rows[y[:, None] - y + (len(y) - 1)]", "rows[y - y[:, None] + (len(y) - 1)]"),
            ("columns of rows", "columns[x[:, None] - x + (len(x) - 1)]", "columns[x - x[:, None] + (len(x) - 1)]"),
            (
                "queries scaled",
                "self._on_grid(content.unflatten(2, size)",
                "self._on_grid(content.unflatten(2, size) * self.head_dim**-0.5",
            ),
            (
                "key minus query elsewhere",
                "queries.coords[..., :, None, axis] - keys.coords[..., None, :, axis]",
                "keys.coords[..., None, :, axis] - queries.coords[..., :, None, axis]",
            ),
            ("weights swapped", "((low, 1 - share), (", "((low, share), ("),
            ("offsets off by one", "+ (size[axis] - 1)", "+ size[axis]"),
            ("tables resized with antialias", '"bilinear", antialias=False', '"bilinear", antialias=True'),
            (
                "rows and columns swapped",
                "by_row.unsqueeze(-1) + by_column.unsqueeze(-2)",
                "by_row.unsqueeze(-2) + by_column.unsqueeze(-1)",
            ),
        ],
    ),
    *mutants_of(
        "bias/buckets.py",
        "parity/test_shaw.py parity/test_irpe.py",
        [
            ("not scaled", " * self.head_dim**-0.5", ""),
            ("scaled twice", " * self.head_dim**-0.5", " / self.head_dim"),
            (
                "key minus query",
                "queries.coords[..., :, None, :] - keys.coords[..., None, :, :]",
                "keys.coords[..., None, :, :] - queries.coords[..., :, None, :]",
            ),
            ("first bucket for prefix tokens", "[..., -1:].sum(0)", "[..., :1].sum(0)"),
            ("first value for prefix tokens", "value=self.num_buckets)", "value=0)"),
            (
                "one table of two",
                "index.expand(*scores.shape[:-1], -1)).sum(0)",
                "index.expand(*scores.shape[:-1], -1))[0]",
            ),
            (
                "value tables in the order y, x",
                "self.value_table.to(p.dtype).unbind()",
                "self.value_table.to(p.dtype).flip(0).unbind()",
            ),
        ],
    ),
    *mutants_of(
        "bias/irpe.py",
        "parity/test_irpe.py",
        [
            ("another gamma", "math.log(8))", "math.log(4))"),
            ("rounded down", "distance, far).round()", "distance, far).floor()"),
            (
                "product transposed",
                "index[:1] * (2 * centre + 1) + index[1:]",
                "index[1:] * (2 * centre + 1) + index[:1]",
            ),
            ("wrong stride", "index[:1] * (2 * centre + 1)", "index[:1] * (2 * centre)"),
            ("Euclidean distance not rounded", "keepdim=True).round()", "keepdim=True)"),
            ("quant without the square", "delta.square().sum(", "delta.abs().sum("),
            ("border of the exact part", "distance <= ratio, distance", "distance <= 1, distance"),
            ("largest bucket", ".clamp(max=int(2 * ratio))", ".clamp(max=round(2 * ratio))"),
        ],
    ),
    *mutants_of(
        "bias/shaw.py",
        "parity/test_shaw.py",
        [
            ("query minus key", "(-delta).round()", "delta.round()"),
            ("y before x", "torch.stack([dx, dy])", "torch.stack([dy, dx])"),
            ("clip off by one", ".clamp(-self.clip, self.clip)", ".clamp(-self.clip, self.clip - 1)"),
            ("wraps in place of clipping", ".clamp(-self.clip, self.clip)", ".remainder(self.clip)"),
        ],
    ),
    *mutants_of(
        "bias/pape.py",
        "parity/test_pape.py",
        [
            (
                "key minus query",
                "queries.coords[..., :, None, :] - keys.coords[..., None, :, :]",
                "keys.coords[..., None, :, :] - queries.coords[..., :, None, :]",
            ),
            ("a and b swapped", "a, b = ab.unflatten", "b, a = ab.unflatten"),
            ("parabolas open upwards", "slope.unsqueeze(-2) - delta @ form", "slope.unsqueeze(-2) + delta @ form"),
            ("relu for softplus", "F.softplus(a), w, w)", "F.relu(a), w, w)"),
            ("scale not squared", ".square()[:, None]", ".abs()[:, None]"),
            ("always scaled", "if self.scaled else bias", "if True else bias"),
            ("scaled twice", "bias * self.head_dim**-0.5", "bias / self.head_dim"),
        ],
    ),
]

BIAS = [*FUNCTIONS, *TABLES, *CONTEXTUAL]
