"""Mutants of input and conditional encodings."""

from tests.mutants.mutation import mutants_of

SINUSOIDS = [
    *mutants_of(
        "input/scalar.py",
        "parity/test_controls.py",
        [
            (
                "divided by the last index",
                "math.prod(positions.feat_shape)\n",
                "(math.prod(positions.feat_shape) - 1)\n",
            ),
            ("divided by the kept tokens", "index / math.prod(positions.feat_shape)", "index / index.shape[-1]"),
            ("never divided", "if self.divided:", "if False:"),
        ],
    ),
    *mutants_of(
        "input/binary.py",
        "parity/test_controls.py",
        [
            ("highest digit first", "torch.arange(self.dim, device=index.device)", "torch.arange(self.dim).flip(0)"),
            ("not rounded", "positions.feat_shape).round()", "positions.feat_shape)"),
            ("digits not cut", ".floor() % 2", ".floor()"),
        ],
    ),
    *mutants_of(
        "input/sinusoidal.py",
        "parity/test_sinusoidal.py",
        [
            ("sin for cos", "waves = angles.sin(), angles.cos()", "waves = angles.cos(), angles.sin()"),
            ("layouts swapped", 'if layout == "interleaved" else', 'if layout == "split" else'),
            (
                "half the exponent",
                "geometric_frequencies(dim // 2, temperature",
                "geometric_frequencies(dim // 2, temperature**0.5",
            ),
            (
                "temperature 100",
                'dim: Count, temperature: Positive = 10000.0, layout: SinCosLayout = "interleaved", **grid_options',
                'dim: Count, temperature: Positive = 100.0, layout: SinCosLayout = "interleaved", **grid_options',
            ),
            ("column order", "flat_index(positions.coords, ", "flat_index(positions.coords.flip(-1), "),
        ],
    ),
    *mutants_of(
        "input/sincos2d.py",
        "parity/test_sincos2d.py",
        [
            ("y before x in MAE", ", dim=-1).flip(-2).flatten(-2)", ", dim=-1).flatten(-2)"),
            ("cos before sin", "angles.cos()], dim=-1).flip(-2)", "angles.cos()][::-1], dim=-1).flip(-2)"),
            ("timm with x first", "angles.cos()], dim=-2).flatten", "angles.cos()], dim=-2).flip(-2).flatten"),
            ("big_vision without its end", 'inclusive=preset == "big_vision"', "inclusive=False"),
            ("MoCo v3 as MAE on squares", "axes, height = axes[::-1], feat_shape[0]", "height = feat_shape[0]"),
            (
                "MoCo v3 in row order",
                "if height != feat_shape[1]:",
                "if height > 10**6:",
            ),
            ("MoCo v3 with W for H", "torch.div(index, height, ", "torch.div(index, feat_shape[1], "),
            (
                "temperature 100",
                "dim: Count, temperature: Positive = 10000.0, preset",
                "dim: Count, temperature: Positive = 100.0, preset",
            ),
        ],
    ),
    *mutants_of(
        "input/fourier.py",
        "parity/test_fourier.py",
        [
            ("cos before sin", "[*box, phase.sin(), phase.cos()]", "[*box, phase.cos(), phase.sin()]"),
            ("without the box", "box.append(u.unsqueeze(-1))", "box.append(0 * u.unsqueeze(-1))"),
            ("Nyquist twice too high", "trained / 2, self.num_bands", "trained, self.num_bands"),
            ("bands of the grid at hand", "torch.linspace(1, trained / 2", "torch.linspace(1, size / 2"),
            ("border to border", "2 * place / max(size - 1, 1) - min(size - 1, 1)", "(2 * place + 1) / size - 1"),
            ("features not normalised", " / math.sqrt(2 * phase.shape[-1])", ""),
            ("x before y", "phase = coords @ to_float64", "phase = coords.flip(-1) @ to_float64"),
            ("gamma inverted", "std=1 / self.gamma", "std=self.gamma"),
        ],
    ),
]

TABLES = [
    *mutants_of(
        "input/learned.py",
        "parity/test_learned.py test_contract.py",
        [
            (
                "dropped prefix row",
                "[0, self.num_prefix_tokens :]",
                "[0, : positions.feat_shape[0] * positions.feat_shape[1]]",
            ),
            (
                "prefix rows from the end",
                "self.pos_embed[0, : self.num_prefix_tokens]",
                "self.pos_embed[0, -self.num_prefix_tokens :]",
            ),
            ("antialias flag ignored", "self.interpolation, self.antialias)", "self.interpolation)"),
            ("rows by order, not by coordinates", "if positions.is_grid:", "if positions.num_patches == len(rows):"),
            ("initial standard deviation", "std=self.init_std", "std=0.02"),
            ("stale grid after resizing", "            self.feat_shape = tuple(feat_shape)\n", "            pass\n"),
        ],
    ),
    *mutants_of(
        "input/learned2d.py",
        "parity/test_learned2d.py",
        [
            ("corners aligned", "(p + 0.5) * (g / n) - 0.5", "p * ((g - 1) / max(n - 1, 1))"),
            ("cells at their left ends", "(p + 0.5) * (g / n) - 0.5", "p * (g / n)"),
            ("shorter side", "(max(size),) * 2", "(min(size),) * 2"),
            ("aspect ignored", "if self.keep_aspect else size", "if False else size"),
            (
                "table on its side",
                "coords.unbind(-1), self.grid_size, size",
                "coords.unbind(-1), self.grid_size[::-1], size",
            ),
            ("ends one off", "p * ((g - 1) / max(n - 1, 1))", "p * (g / max(n - 1, 1))"),
            ("antialias of every preset", "antialias=self.antialias", "antialias=True"),
            ("presets before what is given", "own if value is None else value", "own"),
        ],
    ),
    *mutants_of(
        "input/factorized.py",
        "parity/test_factorized.py",
        [
            (
                "rows and columns swapped",
                "self.pos_embed_y[0], self.pos_embed_x[0]",
                "self.pos_embed_x[0], self.pos_embed_y[0]",
            ),
            ("corners aligned", "(place + 0.5) * (len(table) / n) - 0.5", "place * ((len(table) - 1) / max(n - 1, 1))"),
            ("cells at their left ends", "(place + 0.5) * (len(table) / n) - 0.5", "place * (len(table) / n)"),
            ("sum and product swapped", 'if self.combine == "sum"', 'if self.combine != "sum"'),
            ("coordinates ignored", 'if self.coordinates == "fraction":', "if True:"),
        ],
    ),
    *mutants_of(
        "input/abs_win.py",
        "parity/test_abs_win.py",
        [
            ("window stretched", "torch.remainder(p, size)", "(p % size) * (size - 1) / size"),
            (
                "window not repeated between cells",
                "torch.cat([window, window[:1]], dim=0)",
                "torch.cat([window, window[-1:]], dim=0)",
            ),
            (
                "window on its side",
                "positions.coords.unbind(-1), self.window_size",
                "positions.coords.unbind(-1), self.window_size[::-1]",
            ),
            ("without the window", " + sample_table(window, inside)", ""),
            ("antialias flag ignored", "antialias=self.antialias", "antialias=True"),
            ("columns for rows", "self.pos_embed_win[0].permute(1, 2, 0)", "self.pos_embed_win[0].permute(2, 1, 0)"),
        ],
    ),
]

CONDITIONAL = mutants_of(
    "conditional/depthwise.py",
    "parity/test_peg.py parity/test_lepe.py",
    [
        ("circular for zeros", 'if self.padding == "circular":', "if True:"),
        ("zeros for circular", 'if self.padding == "circular":', "if False:"),
        ("circular off by one", "torch.arange(-margin, ", "torch.arange(1 - margin, 1 + "),
        (
            "convolution of another order",
            "unflatten(2, (height, width))).flatten(2)",
            "unflatten(2, (width, height))).flatten(2)",
        ),
        ("kernel transposed", "F.conv2d(grid, weight,", "F.conv2d(grid, weight.mT,"),
        ("kernel flipped", "F.conv2d(grid, weight,", "F.conv2d(grid, weight.flip(-1, -2),"),
        (
            "cells counted with H for W",
            "index = index * size + positions",
            "index = index * positions.feat_shape[0] + positions",
        ),
        ("cells rounded down", "positions.coords[..., axis].round()", "positions.coords[..., axis].floor()"),
        (
            "tokens by order, not by coordinates",
            "None if positions.is_grid else",
            "None if positions.num_patches == height * width else",
        ),
        ("last token of a cell wins", ".scatter_add(1, index, x)", ".scatter(1, index, x)"),
    ],
)

TOKENS = [*SINUSOIDS, *TABLES, *CONDITIONAL]
