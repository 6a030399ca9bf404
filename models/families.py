"""The families of linear attention as data: what a layer of each is made of, before settings change parts of it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class LinearFamily:
    """What makes a linear layer. `ModelConfig.family` gives it with the settings in place of the defaults."""

    # What the family is.
    decay: str  # how the state fades, one of models.decay.DECAYS
    delta_rule: bool = False  # writes v_t - S^T k_t, weighted by beta, instead of v_t; q and k have unit length
    keys_from_decay: bool = False  # k = 1 - decay, and the decay comes from the projection that others have for k
    conv_activation: str | None = "silu"  # behind the short convolution, where there is one
    normalizer: bool = True  # linear_normalize has a sum of weights to divide by
    # What settings may change.
    feature_map: str = "elu1"  # on queries and keys, one of models.feature_maps
    conv_width: int = 0  # tokens that a short convolution over q, k and v sees; 0: no convolution
    output_gate: str = "silu"  # activation of the gate that multiplies the output, or none


LINEAR_FAMILIES = {
    "none": LinearFamily("none"),
    "fixed": LinearFamily("fixed"),
    "scalar": LinearFamily("scalar"),
    "mamba2": LinearFamily("scalar", normalizer=False, feature_map="identity", conv_width=4),
    "gla": LinearFamily("channel", feature_map="identity"),
    "hgrn2": LinearFamily(
        "bounded", keys_from_decay=True, conv_activation=None, feature_map="silu", output_gate="none"
    ),
    "delta": LinearFamily(
        "none", delta_rule=True, normalizer=False, feature_map="l2norm", conv_width=4, output_gate="none"
    ),
    "gated_delta": LinearFamily("scalar", delta_rule=True, normalizer=False, feature_map="l2norm", conv_width=4),
    "kda": LinearFamily("channel", delta_rule=True, normalizer=False, feature_map="l2norm", conv_width=4),
}
