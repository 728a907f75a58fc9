"""Mutants of what all encodings share: positions, windows, frequencies, resizing, the contract, attention."""

from tests.mutants.mutation import mutants_of

POSITIONS = mutants_of(
    "positions.py",
    "test_positions.py test_windows.py parity/test_rope.py test_contract.py",
    [
        ("axes swapped", 'indexing="ij"', 'indexing="xy"'),
        ("counted from one", "torch.arange(size, dtype", "1 + torch.arange(size, dtype"),
        ("kept index off by one", "coords.index_select(-2, index)", "coords.index_select(-2, (index - 1).abs())"),
        (
            "kept tokens of the first sample",
            "coords.gather(1, index.long().unsq",
            "coords.gather(1, index[:1].long().expand_as(index).unsq",
        ),
        ("kept tokens called a grid", "replace(self, coords=coords, is_grid=False)", "replace(self, coords=coords)"),
        ("shifted the wrong way", ".roll((-shift[0], -shift[1])", ".roll((shift[0], shift[1])"),
        ("shift of the other axis", ".roll((-shift[0], -shift[1])", ".roll((-shift[1], -shift[0])"),
        ("end to end with n for n - 1", "(new - 1) / max(old - 1, 1)", "new / old"),
        ("rescaled coordinates called a grid", "feat_shape=feat_shape, is_grid=False)", "feat_shape=feat_shape)"),
        ("coordinates in bfloat16", "else coords.float()", "else coords.bfloat16().float()"),
    ],
)

WINDOWS = mutants_of(
    "windows.py",
    "test_windows.py hosts/test_window_attention.py",
    [
        ("wrong stride", "* (2 * size - 1) + torch.arange(size", "* (2 * window_size[0] - 1) + torch.arange(size"),
        ("stride of the tokens", "* (2 * size - 1) + torch.arange(size", "* size + torch.arange(size"),
        ("index off by one", "- token + token[-1]", "- token + token[-1] + 1"),
        ("key minus query", "token[:, None] - token + token[-1]", "token - token[:, None] + token[-1]"),
        ("columns first", "for size in window_size:\n", "for size in window_size[::-1]:\n"),
        ("mask sign", 'masked_fill(apart, float("-inf"))', 'masked_fill(apart, float("inf"))'),
        ("mask inverted", "masked_fill(apart, ", "masked_fill(~apart, "),
        ("mask off by one", "(place >= length - offset)", "(place > length - offset)"),
        ("mask of the padded grid, timm's", "(place >= length - offset)", "(place >= len(place) - offset)"),
        ("padding of an axis without a shift hidden", "if offset else torch.zeros_like(place)", "if True else place"),
        ("regions of the axes confused", "2 * wrapped[0][:, None]", "wrapped[0][:, None]"),
        ("mask of one axis", "2 * wrapped[0][:, None]", "0 * wrapped[0][:, None]"),
        ("grid not padded", "length + -length % window,", "length - length % window,"),
        ("windows reversed in column order", '"(b i j) (wh ww) c -> b (i wh)', '"(b j i) (wh ww) c -> b (i wh)'),
        ("windows in column order", "-> (b i j) (wh ww) c", "-> (b j i) (wh ww) c"),
        ("order rolled the wrong way", ".roll((-shift[0], -shift[1])", ".roll((shift[0], shift[1])"),
        ("padded place reads a token", "value=height * width)", "value=0)"),
        ("padded in front", "(0, -width % ww, 0, -height % wh)", "(-width % ww, 0, -height % wh, 0)"),
        ("order of inference mode", "@torch.inference_mode(False)", "@torch.no_grad()"),
        ("gradient by the way out", "TakeTokens.apply(grad, place, order)", "TakeTokens.apply(grad, order, place)"),
        ("tokens of a window in column order", "-> (b i j) (wh ww) c", "-> (b i j) (ww wh) c"),
    ],
)

FREQUENCIES = mutants_of(
    "frequencies.py",
    "parity/test_rope.py parity/test_sincos2d.py parity/test_sinusoidal.py",
    [
        (
            "exponent off by one",
            "to_float64(torch.arange(count, device=device))",
            "to_float64(torch.arange(1, count + 1, device=device))",
        ),
        ("inclusive end ignored", "max(count - 1, 1) if inclusive else count", "count"),
        ("end always included", "max(count - 1, 1) if inclusive else count", "max(count - 1, 1)"),
        ("flat index with H for W", "enumerate(feat_shape[1:], start=1)", "enumerate(feat_shape[:-1], start=1)"),
        ("float32 angles", "else torch.float64)", "else torch.float32)"),
    ],
)

RESIZE = mutants_of(
    "resize.py",
    "test_resize.py parity/test_learned.py parity/test_relative_table.py",
    [
        ("bicubic coefficient", "_kernel(cell - centre, mode, -0.75)", "_kernel(cell - centre, mode, -0.5)"),
        ("antialias coefficient", "/ stretch, mode, -0.5)", "/ stretch, mode, -0.75)"),
        ("corners aligned", "+ 0.5) * scale - 0.5", ") * ((old - 1) / max(new - 1, 1))"),
        ("cells at their left ends", "+ 0.5) * scale - 0.5", ") * scale"),
        ("antialias without a wider kernel", "torch.sym_max(scale, 1.0)", "1.0"),
        ("antialias not normalised", "weights / weights.sum(1, keepdim=True)", "weights"),
        ("border wraps", "cell.clamp(0, old - 1)[:, None] == cells", "cell.remainder(old)[:, None] == cells"),
        ("a tap too few", "(-1, 0, 1, 2) if mode", "(-1, 0, 1) if mode"),
        ("antialias flag ignored", "resize_matrix(new, old, mode, antialias,", "resize_matrix(new, old, mode, True,"),
        ("mode ignored", "resize_matrix(new, old, mode, antialias,", 'resize_matrix(new, old, "bicubic", antialias,'),
        (
            "equal counts taken for equal grids",
            "    if same_grid((h, w), (height, width)):\n        return table\n    prefix",
            "    if h * w == height * width:\n        return table\n    prefix",
        ),
        ("prefix rows at the end", "torch.cat([prefix, patches]", "torch.cat([patches, prefix]"),
        (
            "relative table with antialias",
            "resize_matrix(*size, antialias=False",
            "resize_matrix(*size, antialias=True",
        ),
        ("resized in float32", "tensordot(matrix, resampled,", "tensordot(matrix.float(), resampled.float(),"),
        ("resized with the axes in turn", ".movedim(0, axis)", ""),
        ("geometric ratio", "range(old // 2)) > reach", "range(1, old // 2 + 1)) > reach"),
        (
            "geometric weights swapped",
            "matrix[row, right - 1] = 1 - share\n    matrix[row, right] = share",
            "matrix[row, right - 1] = share\n    matrix[row, right] = 1 - share",
        ),
        ("sampled weights swapped", "(low, 1 - (place - low)), ((low", "(low, place - low), ((low"),
        ("sampled stride", "index * size + cell", "index * sizes[0] + cell"),
        ("sampled beyond the border", "place.clamp(0, size - 1)", "place.clamp(0, sizes[0] - 1)"),
        ("the nearest corner alone", "share * part", "share * part.round()"),
    ],
)

CONTRACT = mutants_of(
    "encoding.py",
    "test_contract.py test_numerics.py hosts/test_attention.py hosts/test_vit.py",
    [
        ("reference_shape ignored", "return positions.rescale(self.reference_shape)", "return positions"),
        ("extrapolate ignored", "is None or self.runs_on:", "is None:"),
        ("the class' way whatever was asked for", "if self.extrapolate is None else self.extrapolate", "or False"),
        ("one way for all", 'self.extrapolation == "run_on" if', "False if"),
        ("float32 beside float64 parameters", "else positions.promote(parameter.dtype)", "else positions"),
        ("a second bias replaces the first", "else self.bias + bias", "else bias"),
        (
            "autocast left on",
            "device.type, enabled=False)",
            "device.type, enabled=torch.is_autocast_enabled(positions.coords.device.type))",
        ),
        ("prefix tokens turned", "(0, 0, num_prefix_tokens, 0)) if", "(0, 0, 0, num_prefix_tokens)) if"),
        (
            "prefix rows of a table at the end",
            "torch.cat([prefix.to(table).expand(*table.shape[:-2], -1, -1), table], dim=-2)",
            "torch.cat([table, prefix.to(table).expand(*table.shape[:-2], -1, -1)], dim=-2)",
        ),
        ("weight decay on tables", "return {name for name, _ in owner.", "return {name[1:] for name, _ in owner."),
    ],
)

PLACE_TESTS = (
    "parity/test_alibi.py parity/test_rope.py parity/test_shaw.py parity/test_lepe.py parity/test_learned.py "
    "hosts/test_attention.py test_contract.py test_numerics.py rotary/test_split.py rotary/test_kept.py "
    "rotary/test_zero_fraction.py rotary/test_any_axes.py parity/test_rope_eva.py"
)
PLACES = [
    *mutants_of(
        "places/input.py",
        PLACE_TESTS,
        [
            (
                "prefix tokens embedded",
                "self.embed(positions), self.embed_prefix(count) if count",
                "self.embed(positions), None if count",
            ),
        ],
    ),
    *mutants_of(
        "places/rotary.py",
        PLACE_TESTS,
        [
            ("float32 beside float64 tokens", "positions.promote(q.dtype).promote(k.dtype)", "positions"),
            ("kept tokens one off", "index + num_prefix_tokens", "index"),
            ("kept tokens of other samples", ".movedim(-3, -4)", ".flip(-3).movedim(-3, -4)"),
            ("prefix tokens never rotated", "self.encode_prefix(count, angles.device) if count", "None if count"),
            (
                "the highest frequencies still",
                "F.pad(series[..., :turning], (0, ",
                "F.pad(series[..., -turning:], (0, ",
            ),
            ("a frequency too many", "- round(self", "- 1 - round(self"),
            ("frequencies of a head in one series", "unflatten(-1, (count, -1))", "unflatten(-1, (1, -1))"),
            ("always two axes", "count = len(positions.feat_shape) if", "count = 2 if"),
            ("sin for cos", "torch.stack([angles.cos(), angles.sin()])", "torch.stack([angles.sin(), angles.cos()])"),
            (
                "bfloat16 angles",
                "torch.stack([angles.cos(), angles.sin()])",
                "torch.stack([angles.bfloat16().cos(), angles.bfloat16().sin()])",
            ),
            (
                "float32 angles",
                "torch.stack([angles.cos(), angles.sin()])",
                "torch.stack([angles.float().cos(), angles.float().sin()])",
            ),
            (
                "keys not rotated",
                "return self.rotate(q, prepared), self.rotate(k, prepared)",
                "return self.rotate(q, prepared), k",
            ),
            (
                "keys of attention not rotated",
                "tensors.q, tensors.k = self.rotate_qk(",
                "tensors.q, _ = self.rotate_qk(",
            ),
        ],
    ),
    *mutants_of(
        "places/bias.py",
        PLACE_TESTS,
        [
            ("prefix tokens biased", "F.pad(bias, (keys, 0, queries, 0))", "F.pad(bias, (0, keys, 0, queries))"),
            (
                "keys elsewhere ignored",
                "bias = self.encode(queries, queries if keys is positions else self.locate(keys))",
                "bias = self.encode(queries, queries)",
            ),
            (
                "keys elsewhere not located",
                "bias = self.encode(queries, queries if keys is positions else self.locate(keys))",
                "bias = self.encode(queries, queries if keys is positions else keys)",
            ),
            (
                "contextual keys not located",
                "located = queries if keys is positions else self.locate(keys)",
                "located = queries if keys is positions else keys",
            ),
            (
                "content of prefix tokens",
                "content[..., positions.num_prefix_tokens :, :]",
                "content[..., : positions.num_patches, :]",
            ),
            (
                "stale cache",
                "return self.bias(positions)",
                'return self.__dict__.setdefault("_cache", self.bias(positions))',
            ),
        ],
    ),
    *mutants_of(
        "places/conditional.py",
        PLACE_TESTS,
        [
            (
                "prefix tokens mixed",
                "F.pad(added, (0, 0, positions.num_prefix_tokens, 0))",
                "F.pad(added, (0, 0, 0, positions.num_prefix_tokens))",
            ),
            (
                "values of heads confused",
                ".unflatten(2, (heads, -1)).transpose(1, 2)\n",
                ".unflatten(2, (-1, heads)).permute(0, 3, 1, 2)\n",
            ),
            ("a second output replaces the first", "else tensors.output + mixed", "else mixed"),
            (
                "conditional mixes prefix tokens",
                "self.encode(x[:, positions.num_prefix_tokens :], positions)",
                "self.encode(x[:, : positions.num_patches], positions)",
            ),
        ],
    ),
]

MASKS = mutants_of(
    "hosts/masks.py",
    "hosts/test_attention.py test_known_bugs_of_tokens.py hosts/test_vit.py",
    [
        ("mask of the caller dropped", "tensors.add_bias(additive(attn_mask, tensors.q.dtype))", "pass"),
        ("boolean mask inverted", "masked_fill(~mask, ", "masked_fill(mask, "),
        ("causal mask off by one", ".triu(1)", ".triu(2)"),
        ("causal mask inverted", "additive(~later, tensors.q.dtype)", "additive(~later.t(), tensors.q.dtype)"),
    ],
)

ATTENTION = mutants_of(
    "hosts/attention.py",
    "hosts/test_attention.py parity/test_lepe.py parity/test_shaw.py test_known_bugs_of_tokens.py "
    "hosts/test_swin.py hosts/test_vit.py",
    [
        ("logits not scaled", "(q * scale) @ k", "q @ k"),
        ("bias twice", "else logits + bias  #", "else logits + 2 * bias  #"),
        ("NaN for a query that sees no key", "logits.masked_fill(fully_masked, 0).softmax", "logits.softmax"),
        ("fused logits not scaled", "dropout_p=p, scale=scale)", "dropout_p=p, scale=1.0)"),
        (
            "tables of dropped patches",
            "positions = positions if index is None else positions.keep(index)",
            "positions = positions",
        ),
        (
            "fused output of encodings dropped",
            "head_dim)\n    return out if tensors.output is None else out + tensors.output",
            "head_dim)\n    return out",
        ),
        (
            "output of encodings dropped",
            ".to(out.dtype)\n    return out if tensors.output is None else out + tensors.output",
            ".to(out.dtype)\n    return out",
        ),
        ("value vectors dropped", "out = out + term(probabilities).to(out.dtype)", "pass"),
        ("dropout of attention dropped", "p = dropout.p if dropout.training else 0.0", "p = 0.0"),
        ("dropout in evaluation", "p = dropout.p if dropout.training else 0.0", "p = dropout.p"),
    ],
)

FAST_ATTENTION = mutants_of(
    "hosts/attention.py",
    "rotary/test_split.py hosts/test_fast_attention.py",
    [
        ("norms of q and k skipped", "if not all(norm is None or", "if not any(norm is None or"),
        ("a hook of the norms unheard", "nn.Identity) and not is_hooked(norm))", "nn.Identity))"),
        (
            "a hook of the projection sees turned channels",
            "is nn.Linear and not is_hooked(layer.qkv)",
            "is nn.Linear",
        ),
        ("a subclass unheard", "RotaryEncoding) and prepared[0][0].turns_pairs:", "RotaryEncoding):"),
        ("turned twice", "overwrite=unseen), prepared[1:]", "overwrite=unseen), prepared"),
        ("fused in bfloat16", "dtype == torch.bfloat16 or", "False or"),
        ("fused with a learned bias", "bias is not None and bias.requires_grad", "False"),
        ("plain in evaluation", '!= "cpu" or not torch.is_grad_enabled()', '!= "cpu"'),
        ("autocast unseen", 'torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x', "x"),
    ],
)

WINDOW_ATTENTION = mutants_of(
    "hosts/window_attention.py",
    "hosts/test_window_attention.py hosts/test_attention.py hosts/test_swin.py",
    [
        (
            "shift masks of other windows",
            ".unflatten(0, (-1, 1 if alike else len(mask))) + hidden",
            ".unflatten(0, (-1, 1 if alike else len(mask))) + hidden.flip(0)",
        ),
        ("shift mask dropped", "mask.unsqueeze(1) if least", "0 * mask.unsqueeze(1).exp() if least"),
        ("bias of a sample in the order of windows", "1 if alike else len(mask)", "1"),
        ("fused bias not in the order of the batch", "-1, -1).flatten(0, 1)", "-1, -1).transpose(0, 1).flatten(0, 1)"),
        ("bias dropped", "logits.add_(bias) if", "logits if"),
        ("bias in bfloat16", "torch.promote_types(logits.dtype, bias.dtype)", "logits.dtype"),
        ("bias twice", "tensors.bias = None", "pass"),
        ("logits of windows not scaled", "tensors.q * self.scale", "tensors.q"),
        (
            "window on its side",
            "Positions.grid(layer.window_size, device",
            "Positions.grid(layer.window_size[::-1], device",
        ),
        ("window tables not resized", "encoding.set_feat_shape(self.window_size)", "pass"),
    ],
)

AUGMENT = mutants_of(
    "augment.py",
    "test_augment.py",
    [
        ("shift after scaling", "((box + shift) * scale + 1)", "(box * scale + shift + 1)"),
        ("cells at their left ends", "(2 * coords + 1) / size - 1", "2 * coords / size - 1"),
        ("not moved back by half a cell", "* size / 2 - 0.5", "* size / 2"),
        ("one draw for all tokens", "torch.rand(coords.shape, device", "torch.rand(coords.shape[-1:], device"),
        (
            "tokens moved one way",
            "generator=generator) * 2 - 1\n            coords",
            "generator=generator)\n            coords",
        ),
        ("jitter not logarithmic", "math.log(self.jitter) * draws[2:4]", "self.jitter * draws[2:4]"),
        ("one jitter for both axes", "math.log(self.jitter) * draws[2:4]", "math.log(self.jitter) * draws[2:3]"),
        ("one shift for both axes", "self.shift * draws[:2]", "self.shift * draws[:1]"),
        ("size of the other axis", "for n in positions.feat_shape]", "for n in positions.feat_shape[::-1]]"),
    ],
)

SHARED = [
    *POSITIONS,
    *WINDOWS,
    *FREQUENCIES,
    *RESIZE,
    *CONTRACT,
    *PLACES,
    *MASKS,
    *ATTENTION,
    *WINDOW_ATTENTION,
    *AUGMENT,
    *FAST_ATTENTION,
]
