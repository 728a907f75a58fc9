"""Mutants of the rotary encodings and of the maths that they share."""

from tests.mutants.mutation import mutants_of

ROTATION = mutants_of(
    "rotation.py",
    "parity/test_rope.py parity/test_rope_mixed.py parity/test_axial_dialects.py rotary/test_convert_layout.py "
    "test_known_bugs.py",
    [
        ("sin for cos", "torch.complex(cos, sin)", "torch.complex(sin, cos)"),
        ("blocks of axes not put back", "return swap_middle_quarters(rotate(swap", "return (rotate(swap"),
        ("turned the other way", "torch.complex(cos, sin)", "torch.complex(cos, -sin)"),
        ("half for interleaved", 'interleaved = layout == "interleaved"', 'interleaved = layout == "half"'),
        ("compiled form the other way", "a * cos - b * sin, a", "a * cos + b * sin, a"),
        (
            "x and y of mixed angles swapped",
            "along_x, along_y = to_float64(freqs)",
            "along_y, along_x = to_float64(freqs)",
        ),
        (
            "angles rounded twice",
            "along_y = to_float64(freqs).unsqueeze",
            "along_y = freqs.bfloat16().double().unsqueeze",
        ),
        ("projection converted backwards", 'order if target == "half" else', 'order if target != "half" else'),
        ("values converted too", "turned, kept = table.split([2 *", "turned, kept = table.split([3 *"),
        ("layouts always in pairs", ".reshape(-1, block).T.flatten()", ".reshape(-1, 2).T.flatten()"),
    ],
)

SPLIT = mutants_of(
    "rotary/split.py",
    "rotary/test_split.py rotary/test_scaling.py",
    [
        ("gradient turned the same way", "_turn(grad, cos, -sin, ", "_turn(grad, cos, sin, "),
        ("values turned", "if table is None or index == 2:", "if table is None:"),
        ("half turned the other way", "first.addcmul_(b, sin, value=-1)", "first.addcmul_(b, sin)"),
        (
            "gradient of the angles reversed",
            "[-along * sin, along * cos]",
            "[along * sin, -along * cos]",
        ),
        ("angles of queries alone", "return pairs.sum(2, keepdim=True)", "return pairs[:, :, :1]"),
        (
            "angles of the first sample alone",
            ".flatten(2) for y in (x, grad))\n",
            ".flatten(2)[:1] for y in (x, grad))\n",
        ),
        ("pairs of the wrong neighbours", "pairs = total[..., ::2]", "pairs = total[..., ::2].flip(-1)"),
        ("overwritten where it cannot be", 'layout == "interleaved" and lies_in_pairs(qk)', 'layout == "interleaved"'),
        ("transformations unseen", "if not is_plain_eager():", "if False:"),
        ("a second derivative in silence", "differentiable = must_be_differentiable(*grads)", "differentiable = False"),
        ("turned the same way in a graph", "rotate(q, cos, -sin, layout), ", "rotate(q, cos, sin, layout), "),
        ("lengths of a table twice", "table / table.square().sum(0)", "table"),
        ("angles reversed in a graph", "(x1 * grad2 - x2 * grad1)", "(x2 * grad1 - x1 * grad2)"),
    ],
)

SCALING = mutants_of(
    "rotary/scaling.py",
    "rotary/test_scaling.py",
    [
        ("axes swapped", "zip(sizes, trained, strict=True)", "zip(sizes[::-1], trained[::-1], strict=True)"),
        ("smaller grids stretched", ".clamp(min=1)\n", "\n"),
        ("the smallest axis for all", "s.amax().expand_as(s)", "s.amin().expand_as(s)"),
        ("one scale always", 'if self.settings["per_axis"] else', "if False else"),
        ("linear the other way", "linear = theta / s", "linear = theta * s"),
        ("NTK of all pairs", "/ max(count - 1, 1))", "/ count)"),
        ("turns of radians", "n * first / (2 * math.pi)", "n * first"),
        ("turns of a pair that turns by one radian", "n * first / (2", "n / (2"),
        ("ramp the other way", "1 - ramp(count", "ramp(count"),
        ("ends not rounded", "max(math.floor(math.log(low) / ratio), 0)", "max(math.log(low) / ratio, 0)"),
        ("ramp from behind", "max(math.floor(math.log(low) / ratio), 0)", "math.floor(math.log(low) / ratio)"),
        ("parts in one turn", "blend(linear, ntk, *BY_PARTS[0])", "ntk"),
        ("YaRN without its factor", "(1 + self.settings", "(1 + 0 * self.settings"),
        ("prefix tokens lengthened", "torch.cat([prefix, patches *", "torch.cat([prefix * 1.1, patches *"),
        ("the factor of the shorter axis", "s.amax().log()", "s.amin().log()"),
        ("contradictions unseen", "asked != self.extrapolate", "False"),
        ("scaled without a grid", "and self.trained_shape is None:", "and False:"),
        ("coordinates interpolated as well", "return self.scales or super().runs_on", "return super().runs_on"),
        ("'trained' ignored", "if self.scales else None) or", "if False else None) or"),
        ("keys unchecked", "key in accepted and fits(value[key], accepted[key])", "True"),
        ("learned frequencies as they are", "return to_float64(positions.coords) / s", "return positions.coords"),
    ],
)

ROPE = [
    *mutants_of(
        "rotary/rope1d.py",
        "parity/test_rope.py",
        [
            ("temperature 100", "temperature: Positive = 10000.0", "temperature: Positive = 100.0"),
            (
                "column order",
                "flat_index(positions.coords, positions",
                "flat_index(positions.coords.flip(-1), positions",
            ),
            (
                "frequencies of half the pairs",
                "count = self.head_dim // 2",
                "count = self.head_dim // 4",
            ),
        ],
    ),
    *mutants_of(
        "rotary/rope_axial.py",
        "parity/test_rope.py parity/test_axial_dialects.py",
        [
            (
                "temperature of the function",
                "head_dim: int,\n    temperature: float = 100.0",
                "head_dim: int,\n    temperature: float = 10000.0",
            ),
            ("layout of the preset ignored", "layout or DIALECTS[preset].layout", 'layout or "interleaved"'),
            (
                "temperature of the preset ignored",
                "self.dialect.temperature if temperature is",
                "100.0 if temperature is",
            ),
            ("sections of pairs of the picture", "zip(theta.T, self.sections", "zip(theta.T, self.sections[::-1]"),
            ("sections one too long", "(rounds < n)", "(rounds <= n)"),
            ("one learned series for all heads", 'num_heads if learn_frequencies == "per_head" else 1', "1"),
            ("learned at another start", "self.dialect).log())", "self.dialect))"),
            (
                "learned without the exponential",
                "to_float64(self.log_frequencies).exp()",
                "to_float64(self.log_frequencies)",
            ),
            ("learned frequencies rounded", "if moved.dtype.itemsize >= 4 else", "if True else"),
        ],
    ),
    *mutants_of(
        "rotary/dialects.py",
        "parity/test_rope.py parity/test_axial_dialects.py",
        [
            ("y before x", '"rope_vit": Dialect("xy", False', '"rope_vit": Dialect("yx", False'),
            ("axes in turn", '"rope_vit": Dialect("xy", False', '"rope_vit": Dialect("xy", True'),
            ("temperature 10000", 'False, 100.0, "interleaved"', 'False, 10000.0, "interleaved"'),
            ("moonvit in blocks", '"moonvit": Dialect("xy", True', '"moonvit": Dialect("xy", False'),
            (
                "pixtral with a series for each axis",
                '"pixtral": Dialect("yx", False, True',
                '"pixtral": Dialect("yx", False, False',
            ),
            ("qwen_vit with x first", '"qwen_vit": Dialect("yx"', '"qwen_vit": Dialect("xy"'),
            ("gemma4 in halves of the head", '100.0, "half_per_axis"', '100.0, "half"'),
            ("mrope with x before y", '"tyx"', '"txy"'),
            ("exponent of one axis", "geometric_frequencies(pairs // axes, temp", "geometric_frequencies(pairs, temp"),
            (
                "blocks and turns confused",
                "(angles if dialect.in_turn else angles.mT)",
                "(angles.mT if dialect.in_turn else angles)",
            ),
            ("time taken for a row", '"t": torch.zeros_like(y)', '"t": y'),
        ],
    ),
    *mutants_of(
        "rotary/rope_mixed.py",
        "parity/test_rope_mixed.py",
        [
            ("half a turn between the directions", "+ math.pi / 2", "+ math.pi"),
            ("sin for cos", "[directions.cos(), directions.sin()]", "[directions.sin(), directions.cos()]"),
            ("temperature 100", "temperature: Positive = 10.0", "temperature: Positive = 100.0"),
            ("heads in one quadrant", "2 * math.pi * torch.rand(", "torch.rand("),
            ("one rotation for all heads", "torch.rand(self.num_heads, device", "torch.rand(1, device"),
        ],
    ),
    *mutants_of(
        "rotary/rope_eva.py",
        "parity/test_rope_eva.py",
        [
            ("centre of the cell", "i / n * n_ref for", "((i + 0.5) / n * n_ref - 0.5) for"),
            ("end to end", "i / n * n_ref for", "i / max(n - 1, 1) * (n_ref - 1) for"),
            ("rescaled the wrong way", "i / n * n_ref for", "i * n / n_ref for"),
            (
                "x before y",
                "(to_float64(positions.coords)[..., None]",
                "(to_float64(positions.coords).flip(-1)[..., None]",
            ),
            ("temperature 100", "temperature: Positive = 10000.0", "temperature: Positive = 100.0"),
        ],
    ),
    *mutants_of(
        "rotary/rope_dinov3.py",
        "parity/test_rope_dinov3.py",
        [
            ("cells at their left ends", "2 * (i + 0.5) / n - 1", "2 * i / n - 1"),
            ("box [0, 2]", "2 * (i + 0.5) / n - 1", "2 * (i + 0.5) / n"),
            ("half the frequency", "(2 * math.pi * box", "(math.pi * box"),
            (
                "x before y",
                "to_float64(positions.coords)\n",
                "to_float64(positions.coords).flip(-1)\n",
            ),
            ("max for min", '{"max": max, "min": min}', '{"max": min, "min": max}'),
            ("sizes swapped", "zip(box.unbind(-1), sizes", "zip(box.unbind(-1), sizes[::-1]"),
            (
                "longest period excluded",
                "self.min_period, self.min_period, True",
                "self.min_period, self.min_period, False",
            ),
            ("shortest period ignored", "device=box.device) / shortest", "device=box.device)"),
            ("run on in another box", "u * (n / t)", "u"),
            ("turns of half a box", "4 * math.pi / n / shortest", "2 * math.pi / n / shortest"),
            ("temperature 10000", "temperature: Positive | None = 100.0", "temperature: Positive | None = 10000.0"),
            ("interleaved for half", 'layout: Layout = "half"', 'layout: Layout = "interleaved"'),
        ],
    ),
    *mutants_of(
        "rotary/rope_golden.py",
        "parity/test_rope_golden.py",
        [
            ("other golden angle", "(math.sqrt(5) - 1) / 2", "(3 - math.sqrt(5)) / 4"),
            ("heads alike", ".view(self.num_heads, pairs)", ".view(self.num_heads, pairs)[:1]"),
            (
                "box on its side",
                "math.sqrt(height / width), math.sqrt(width / height)",
                "math.sqrt(width / height), math.sqrt(height / width)",
            ),
            ("box from border to border", "2 * half / max(n - 1, 1)", "2 * half / n"),
            (
                "run on in another box",
                "box_steps(self.trained_shape if self.runs_on else",
                "box_steps(positions.feat_shape if False else",
            ),
            ("the slowest scaled least", "turning.flip(0), fall", "turning, fall"),
            ("not centred", "(i - (n - 1) / 2)", "(i - n / 2)"),
            ("frequencies the other way", "self.min_freq / self.max_freq", "self.max_freq / self.min_freq"),
            ("largest frequency excluded", "ratio, inclusive=True", "ratio, inclusive=False"),
            ("still pairs last", "(still, 0))", "(0, still))"),
            ("directions over a whole turn", "(math.pi / groups)", "(2 * math.pi / groups)"),
        ],
    ),
    *mutants_of(
        "rotary/rope_spiral.py",
        "parity/test_rope_spiral.py",
        [
            ("a direction for each frequency", "device=device) // 2 % half)", "device=device) % half)"),
            ("directions over a quarter", "(math.pi / self.num_directions)", "(math.pi / 2 / self.num_directions)"),
            ("directions not shared out", "// 2 % half)", "// 2 % self.num_directions)"),
            ("highest frequency 1", "self.max_freq * geometric", "geometric"),
            ("sense of the second direction", "-fy * t.sin()]", "fy * t.sin()]"),
            (
                "x before y",
                "[torch.cat(of_x), torch.cat(of_y)]",
                "[torch.cat(of_y), torch.cat(of_x)]",
            ),
            ("end to end", "(self.reference_side / n)", "((self.reference_side - 1) / max(n - 1, 1))"),
            ("steps of the grid at hand", "i * (self.reference_side / n)", "i"),
        ],
    ),
]

LEARNED = [
    *mutants_of(
        "rotary/blocks.py",
        "parity/test_liere.py parity/test_comrope.py rotary/test_skew_exp.py",
        [
            ("turned the other way", "return matrix - matrix.mT", "return matrix.mT - matrix"),
            (
                "triangle read by columns",
                "torch.triu_indices(size, size, 1, device=upper.device)",
                "torch.tril_indices(size, size, -1, device=upper.device).flip(0)",
            ),
            ("inverse rotation", "hnjrc,bhnjc->bhnjr", "hnjcr,bhnjc->bhnjr"),
            ("layouts confused", 'interleaved = self.layout == "interleaved"', 'interleaved = self.layout == "half"'),
            ("float32 exponential", "to_float64(angles).unflatten", "angles.float().unflatten"),
            ("a Taylor polynomial too short", "DEGREE, SQUARINGS = 10, 16", "DEGREE, SQUARINGS = 5, 16"),
            ("triangles not compared", "triangles is None or not torch.equal(triangles, upper)", "triangles is None"),
            ("table of inference mode", "torch.inference_mode(False)", "torch.no_grad()"),
            ("sense of blocks of two", "eye + generators.sin()", "eye - generators.sin()"),
            (
                "prefix tokens turned",
                "(0, 0, positions.num_prefix_tokens, 0)",
                "(0, 0, 0, positions.num_prefix_tokens)",
            ),
        ],
    ),
    *mutants_of(
        "rotary/liere.py",
        "parity/test_liere.py",
        [
            ("border to border", "n / n_ref / max(n - 1, 1)", "1 / n_ref"),
            ("reference_shape ignored", "n / n_ref / max(n - 1, 1)", "1 / max(n - 1, 1)"),
            ("rescaled the wrong way", "n / n_ref / max(n - 1, 1)", "n_ref / n / max(n - 1, 1)"),
            ("half a turn at the start", "0, 2 * math.pi)", "0, math.pi)"),
        ],
    ),
    *mutants_of(
        "rotary/comrope.py",
        "parity/test_comrope.py",
        [
            ("centre of the picture ignored", "(i + 0.5) / n - 0.5", "(i + 0.5) / n"),
            ("cells at their left ends", "(i + 0.5) / n - 0.5", "i / n - 0.5"),
            ("axes of the partition swapped", "torch.stack([odd, 1 - odd])", "torch.stack([1 - odd, odd])"),
            ("initial standard deviation", "math.sqrt(2) * self.init_std", "self.init_std"),
        ],
    ),
    *mutants_of(
        "rotary/string.py",
        "parity/test_string.py",
        [
            ("Cayley sign", "solve_ex(eye + s, eye - s", "solve_ex(eye - s, eye + s"),
            ("y before x", "x, y = to_float64(self.freqs)", "y, x = to_float64(self.freqs)"),
            ("half the frequencies of circulants", "waves = 2 * (2 * math.pi", "waves = (2 * math.pi"),
            ("cosines of circulants", "k[1:, None] * k).sin()", "k[1:, None] * k).cos()"),
            ("Nyquist as a constant", "d**-0.5 * (math.pi * n).cos()", "d**-0.5"),
            ("basis not normalised", "math.sqrt(2 / d) * turns.cos()", "turns.cos()"),
            ("frequencies not axial", "temperature).repeat(2)", "temperature).flip(0).repeat(2)"),
        ],
    ),
    *mutants_of(
        "rotary/basis.py",
        "parity/test_string.py parity/test_harope.py",
        [
            ("basis for its inverse", "exact @ inner.to(exact.dtype)", "exact @ inner.mT.to(exact.dtype)"),
            ("outer basis forgotten", "turned = exact + (turned - inside) @ outer.to(exact.dtype)", "pass"),
            ("prefix tokens not left alone", "exact + (turned - inside) @ outer.to", "turned @ outer.to"),
            ("keys go back by their own", "self._turn(k, table, b, a.mT)", "self._turn(k, table, b, b.mT)"),
            ("keys by the matrix of queries", "self._turn(tensors.k, table, b)", "self._turn(tensors.k, table, a)"),
            ("folded with the inverse", "(bases.mT @ table.to(bases))", "(bases @ table.to(bases))"),
            ("folded into the other projection", "self.bases()[int(keys)]", "self.bases()[1 - int(keys)]"),
        ],
    ),
    *mutants_of(
        "rotary/pope.py",
        "parity/test_pope.py",
        [
            ("x before y", 'DIALECTS["qwen_vit"]', 'DIALECTS["rope_vit"]'),
            ("relu for softplus", "F.softplus(", "F.relu("),
            ("sines before cosines", "for table in prepared.unbind(0)]", "for table in prepared.unbind(0)[::-1]]"),
            ("half a circle", "-2 * math.pi  # (heads", "-math.pi  # (heads"),
            ("not clamped above", "b.masked_fill(b > 0, 0)", "b"),
            ("b the other way", 'cos, sin, "half")', 'cos, -sin, "half")'),
            ("b of the first head", "self.phases).unsqueeze(-2)", "self.phases)[:1].unsqueeze(-2)"),
            ("keys rounded twice", "self.rotate(exact, prepared)", "self.rotate(k, prepared)"),
            ("temperature 10000", "temperature: Positive = 100.0", "temperature: Positive = 10000.0"),
            ("as wide as before", "return self.head_dim\n", "return self.head_dim // 2\n"),
        ],
    ),
    *mutants_of(
        "rotary/harope.py",
        "parity/test_harope.py",
        [
            ("half the exponent forgotten", "self.head_dim) / 2) for upper", "self.head_dim)) for upper"),
            ("not positive", "+ 1e-6  # (heads", "+ 1e-3  # (heads"),
            ("U and V swapped", "return (v * s) @ u.mT, (v / s) @ u.mT", "return (u * s) @ v.mT, (u / s) @ v.mT"),
            ("orthogonal alone", "return (v * s) @ u.mT, (v / s) @ u.mT", "return v @ u.mT, v @ u.mT"),
            ("keys like queries", "(v / s) @ u.mT", "(v * s) @ u.mT"),
            ("another start", "math.log(math.e - 1)", "0.0"),
            ("temperature 10000", "temperature: Positive = 100.0", "temperature: Positive = 10000.0"),
            (
                "folded at another temperature",
                'kept = ("temperature", "layout", "zero_fraction"',
                'kept = ("layout", "zero_fraction"',
            ),
        ],
    ),
]

ROTARY = [*ROTATION, *SPLIT, *SCALING, *ROPE, *LEARNED]
