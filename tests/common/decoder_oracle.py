"""The forward pass of the models written out again, from parameters and settings alone, in plain fp64 torch."""

import math

import oracles
import sparse_oracle
import torch

from longspan.attention import Hierarchical, TopBlocks
from longspan.models.selections import build_selection

# What `auto` and -1 mean: feature map, convolution width, output gate.
FAMILIES = {
    "none": ("elu1", 0, True),
    "fixed": ("elu1", 0, True),
    "scalar": ("elu1", 0, True),
    "mamba2": ("identity", 4, True),
    "gla": ("identity", 0, True),
    "hgrn2": ("silu", 0, False),
    "delta": ("l2norm", 4, False),
    "gated_delta": ("l2norm", 4, True),
    "kda": ("l2norm", 4, True),
}
DELTA_RULE = ("delta", "gated_delta", "kda")


def reference_logits(model, tokens, lengths):
    """[T, V] in fp64, for documents of these lengths laid end to end; everything but attention looks at all at once."""
    c, p = model.config, {name: x.detach().double() for name, x in model.named_parameters()}
    x = p["embedding.weight"][tokens]
    for layer in range(c.num_layers):
        own = {name.removeprefix(f"blocks.{layer}."): x for name, x in p.items() if name.startswith(f"blocks.{layer}.")}
        x = x + mixed(c, own, norm(x, own["mixer_norm.weight"], c.norm_eps), lengths, layer)
        x = x + mlp(own, norm(x, own["mlp_norm.weight"], c.norm_eps))
    return norm(x, p["norm.weight"], c.norm_eps) @ p["embedding.weight" if c.tie_embeddings else "head.weight"].T


def reference_velocity(model, noisy, times, lengths):
    """[T, 3] in fp64 of a diffusion transformer, for images of these numbers of pixels laid end to end."""
    c, p = model.config, {name: x.detach().double() for name, x in model.named_parameters()}
    hidden, conditions = c.hidden_size, []
    for t in times.tolist():
        angles = [1000 * t * 10000 ** (-i / 128) for i in range(128)]
        features = torch.tensor([*map(math.cos, angles), *map(math.sin, angles)], dtype=torch.float64)
        inner = silu(p["time.0.weight"] @ features + p["time.0.bias"])
        inner = silu(p["time.2.weight"] @ inner + p["time.2.bias"])
        conditions.append(p["modulation.weight"] @ inner + p["modulation.bias"])
    condition = torch.stack(conditions).repeat_interleave(torch.tensor(lengths), 0)
    x = noisy @ p["embedding.weight"].T + p["embedding.bias"]
    for layer in range(c.num_layers):
        own = {name.removeprefix(f"blocks.{layer}."): x for name, x in p.items() if name.startswith(f"blocks.{layer}.")}
        a, b, gate, d, e, mlp_gate = (condition[:, : 6 * hidden] + own["modulation"]).split(hidden, -1)
        x = x + gate * mixed(c, own, norm(x, own["mixer_norm.weight"], c.norm_eps) * (1 + b) + a, lengths, layer)
        x = x + mlp_gate * mlp(own, norm(x, own["mlp_norm.weight"], c.norm_eps) * (1 + e) + d)
    a, b = condition[:, 6 * hidden :].split(hidden, -1)
    return (norm(x, p["norm.weight"], c.norm_eps) * (1 + b) + a) @ p["head.weight"].T + p["head.bias"]


def mixed(c, p, x, lengths, layer):
    kind = c.pattern[layer % len(c.pattern)]
    kind = f"linear:{c.linear_family}" if kind == "linear" else kind
    mixer = {name.removeprefix("mixer."): x for name, x in p.items() if name.startswith("mixer.")}
    if not kind.startswith("linear"):
        return softmax_mixer(c, mixer, x, lengths, kind)
    if kind == "linear:mamba2":
        return mamba2_mixer(c, mixer, x, lengths)
    return linear_mixer(c, mixer, x, lengths, kind.removeprefix("linear:"), layer)


def mlp(p, x):
    inner = silu(x @ p["mlp.gate_proj.weight"].T) * (x @ p["mlp.up_proj.weight"].T)
    return inner @ p["mlp.down_proj.weight"].T


def norm(x, weight, eps):
    return x / (x * x).mean(-1, keepdim=True).add(eps).sqrt() * weight


def sigmoid(x):
    return 1 / (1 + torch.exp(-x))


def silu(x):
    return x * sigmoid(x)


def heads(x, number):
    return x.reshape(len(x), number, -1)


def rope(x, c, lengths):
    size = x.shape[-1]
    base = c.rope_base * c.rope_scaling ** (size / (size - 2))
    out, row = x.clone(), 0
    for length in lengths:
        for position in range(length):
            for i in range(size // 2):
                angle = position * base ** (-2 * i / size)
                a, b = x[row, :, i], x[row, :, i + size // 2]
                out[row, :, i] = a * math.cos(angle) - b * math.sin(angle)
                out[row, :, i + size // 2] = a * math.sin(angle) + b * math.cos(angle)
            row += 1
    return out


def image_rope(x, c, lengths):
    """The first half of the pairs turns by row, the second by column; the places are those of a quad-tree."""
    size, out, row = x.shape[-1], x.clone(), 0
    for length in lengths:
        for place in range(length):
            at = pixel(place)
            for i in range(size // 2):
                axis, pair = divmod(i, size // 4)
                base = c.rope_base * c.rope_scaling ** (size / 2 / (size / 2 - 2))
                angle = at[axis] * base ** (-2 * pair / (size // 2))
                a, b = x[row, :, i], x[row, :, i + size // 2]
                out[row, :, i] = a * math.cos(angle) - b * math.sin(angle)
                out[row, :, i + size // 2] = a * math.sin(angle) + b * math.cos(angle)
            row += 1
    return out


def pixel(place):
    """(row, column) by descent: quarters of the smallest square that holds the place, top left, top right, bottom left,
    bottom right."""
    row = column = 0
    side = 1
    while side * side <= place:
        side *= 2
    while side > 1:
        side //= 2
        quarter, place = divmod(place, side * side)
        row, column = row + side * (quarter // 2), column + side * (quarter % 2)
    return row, column


def softmax_mixer(c, p, x, lengths, kind):
    q, k, v = (x @ p[f"{name}_proj.weight"].T for name in "qkv")
    kv_heads = c.num_kv_heads or c.num_heads
    q, k, v = heads(q, c.num_heads), heads(k, kv_heads), heads(v, kv_heads)
    if c.qk_norm:
        q, k = norm(q, p["q_norm.weight"], c.norm_eps), norm(k, p["k_norm.weight"], c.norm_eps)
    causal = c.task == "text"
    q, k = (rope(x, c, lengths) if causal else image_rope(x, c, lengths) for x in (q, k))
    if kind == "llsa":
        selection = Hierarchical(c.llsa_block, c.llsa_keep, c.llsa_levels)
        out = sparse_oracle.sparse_attention(q, k, v, lengths, selection=selection, causal=causal)
    elif kind == "sparse":
        out = sparse_oracle.sparse_attention(q, k, v, lengths, selection=build_selection(c.sparse_selection))
    elif kind == "sla":
        selection = TopBlocks(c.sla_keep, c.sla_query_block, c.sla_key_block)
        out = sparse_oracle.sparse_attention(q, k, v, lengths, selection=selection, causal=causal)
        out = out + sparse_oracle.linear_branch(
            q, k, v, p["linear_weight"], p["linear_bias"], lengths, over=c.sla_linear, feature_map="softmax",
            selection=selection, causal=causal,
        )  # fmt: skip
    else:
        window = c.window if kind == "softmax:window" else None
        out = oracles.softmax_attention(q, k, v, lengths, causal=causal, window=window)
    return out.reshape(len(x), -1) @ p["o_proj.weight"].T


def convolve(x, weight, lengths, activation=True):
    """Each token's and its predecessors' weighted sum, and silu of it; weight [D, W], the last column for the token."""
    out, start = torch.zeros_like(x), 0
    for length in lengths:
        for t in range(length):
            for back in range(min(t + 1, weight.shape[1])):
                out[start + t] += weight[:, -1 - back] * x[start + t - back]
        start += length
    return silu(out) if activation else out


def feature_map(name, x):
    for step in name.split("+"):
        x = {
            "identity": lambda x: x,
            "silu": silu,
            "relu": lambda x: x.clamp(min=0),
            "elu1": lambda x: torch.where(x > 0, x + 1, torch.exp(x)),
            "l2norm": lambda x: x / ((x * x).sum(-1, keepdim=True) + 1e-6).sqrt(),
        }[step](x)
    return x


def settings(c, family):
    """Feature map, convolution width and output gate of a layer."""
    own_map, own_width, own_gate = FAMILIES[family]
    name = own_map if c.feature_map == "auto" else c.feature_map
    if family in DELTA_RULE and name != "l2norm":
        name += "+l2norm"
    width = own_width if c.conv_width == -1 else c.conv_width
    return name, width, own_gate if c.output_gate == "auto" else c.output_gate == "silu"


def scalar_decay(p, a):
    step = torch.log1p(torch.exp(a + p["dt_bias"]))
    return -torch.exp(p["A_log"]) * step, step


def linear_mixer(c, p, x, lengths, family, layer):
    name, width, gated = settings(c, family)
    number = c.linear_num_heads or c.num_heads
    decay, beta, gate = None, None, {n.removeprefix("decay.gate."): y for n, y in p.items()}
    if family == "fixed" and c.decay_slopes == "lightning":
        decay = torch.tensor([-8 * h / number * (1 - layer / c.num_layers) for h in range(number)]).double()
    elif family == "fixed":
        decay = torch.tensor([math.log(1 - 2.0 ** (-5 - h)) for h in range(number)]).double()
    elif family in ("scalar", "gated_delta"):
        decay, _ = scalar_decay(gate, x @ p["decay.a_proj.weight"].T)
    elif family in ("gla", "kda"):
        decay = x @ p["decay.in_proj.weight"].T @ p["decay.out_proj.weight"].T + gate["bias"]
        decay = heads(torch.log(sigmoid(decay)) / 16, number)
    if family in DELTA_RULE:
        beta = sigmoid(x @ p["b_proj.weight"].T)
    projected = [x @ p[f"{n}_proj.weight"].T for n in "qkv"]
    if width:
        assert p["conv.weight"].shape[1] == width
        weights = p["conv.weight"].split([y.shape[1] for y in projected])
        projected = [convolve(y, w, lengths, family != "hgrn2") for y, w in zip(projected, weights)]
    q, k, v = (heads(y, number) for y in projected)
    q = feature_map(name, q)
    if family == "hgrn2":
        bound = max(layer / c.num_layers, 1e-6)
        forget = bound + (1 - bound) * sigmoid(k)
        k, decay = 1 - forget, forget.log()
    else:
        k = feature_map(name, k)
    gates = dict(log_decay=decay, beta=beta, causal=c.task == "text")
    out = oracles.linear_attention(q, k, v, lengths, **gates, normalize=c.linear_normalize)
    out = norm(out, p.get("o_norm.weight", 1), c.norm_eps).reshape(len(x), -1)
    if gated:
        out = out * silu(x @ p["g_proj.weight"].T)
    return out @ p["o_proj.weight"].T


def mamba2_mixer(c, p, x, lengths):
    """As the recurrence of its paper: h_t = exp(A dt_t) h_{t-1} + dt_t B_t x_t^T, y_t = h_t^T C_t + D x_t."""
    name, width, gated = settings(c, "mamba2")
    number, size = c.linear_num_heads or c.num_heads, c.state_size
    inner = p["o_proj.weight"].shape[1]
    z, streams, dt = (x @ p["in_proj.weight"].T).split([inner if gated else 0, inner + 2 * size, number], -1)
    streams = convolve(streams, p["conv.weight"], lengths) if width else streams
    u, B, C = streams.split([inner, size, size], -1)
    u, B, C = heads(u, number), feature_map(name, B), feature_map(name, C)
    decay, step = scalar_decay({n.removeprefix("gate."): y for n, y in p.items()}, dt)
    out, row = torch.zeros_like(u), 0
    for length in lengths:
        state = u.new_zeros(number, size, inner // number)
        for t in range(row, row + length):
            write = step[t, :, None, None] * B[t, None, :, None] * u[t, :, None, :]
            state = decay[t].exp()[:, None, None] * state + write
            out[t] = (state * C[t, None, :, None]).sum(1) + p["D"][:, None] * u[t]
        row += length
    out = out.reshape(len(x), -1)
    return norm(out * silu(z) if gated else out, p.get("o_norm.weight", 1), c.norm_eps) @ p["o_proj.weight"].T
