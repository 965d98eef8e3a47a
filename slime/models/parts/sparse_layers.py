"""Which layers have experts: 1 for those, 0 for dense ones, as the families' configs say it."""

from slime.models.config_json import ConfigJson


def everywhere(config: ConfigJson, layers: int) -> list[int]:
    """Every layer."""
    return [1] * layers


def after_first_dense(config: ConfigJson, layers: int) -> list[int]:
    """All but the first `first_k_dense_replace`, which the list `mlp_layer_types` (dense, sparse) may say too."""
    types, dense = config.raw("mlp_layer_types"), config.raw("first_k_dense_replace")
    config.only("moe_layer_freq", (1, [1] * layers), "only experts in every layer after the first dense ones are mapped")
    if types is None:
        dense = config.whole("first_k_dense_replace", 0)
        return [int(layer >= dense) for layer in range(layers)]
    if not isinstance(types, list) or len(types) != layers or set(map(str, types)) - {"dense", "sparse"}:
        raise config.error("mlp_layer_types", f"a list of {layers} times dense or sparse is needed")
    if types != sorted(types):  # dense, then sparse
        raise config.error("mlp_layer_types", "only experts in every layer after the first dense ones are mapped")
    if dense not in (None, types.count("dense")):
        raise config.error("mlp_layer_types", f"contradicts first_k_dense_replace={dense}, which SGLang reads; make them agree")
    return [int(kind == "sparse") for kind in types]
