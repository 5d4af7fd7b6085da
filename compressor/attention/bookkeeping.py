"""The numbers by which attention code counts its heads, brought into line with what is left of them.

Which attribute of a module counts what cannot be seen from its weights, only from its name; a value that does not
agree with the name is left alone.
"""

from __future__ import annotations

from collections.abc import Sequence

from compressor.attention.nouns import AttentionLayer
from compressor.attention.slim import Editor, config_value
from compressor.attention.trace import HEAD_COUNTS, KEY_COUNTS
from compressor.errors import PlanError

_GROUPS = ("num_key_value_groups", "num_kv_groups", "n_rep")
_WIDTHS = ("all_head_size", "split_size", "embed_dim", "hidden_size", "inner_dim", "d_model", "d_model_size", "dim")


def counts_left(layer: AttentionLayer, removed: Sequence[int]) -> tuple[int, int]:
    """Numbers of heads and of key/value heads that a layer has without those removed."""
    mapping = _mapping_left(layer, removed)
    if layer.keys_shared or not layer.num_heads:
        return len(mapping), layer.num_key_value_heads
    return len(mapping), layer.num_key_value_heads * (max(mapping, default=-1) + 1) // len(set(layer.key_value_index))


def _mapping_left(layer: AttentionLayer, removed: Sequence[int]) -> tuple[int, ...]:
    """Which keys every head that stays reads, counted as they will be."""
    read = [layer.key_value_index[head] for head in range(layer.num_heads) if head not in set(removed)]
    staying = list(range(layer.num_key_value_heads)) if layer.keys_shared else sorted(set(read))
    return tuple(staying.index(key) for key in read)


def keep_count(editor: Editor, layer: AttentionLayer, removed: Sequence[int]) -> None:
    """Tell the modules of a layer how many heads it has without those removed.

    Raises:
        PlanError: its key/value heads would come to be shared in a way that its code cannot express.
    """
    mapping = _mapping_left(layer, removed)
    heads, keys = counts_left(layer, removed)
    sizes = [len(set(group) - set(removed)) for group in layer.groups]
    # What stock code takes for granted: consecutive heads share a key/value head, as many each.
    shares = layer.num_key_value_heads if layer.keys_shared else max(mapping) + 1
    even = heads % shares == 0 and mapping == tuple(head * shares // heads for head in range(heads))
    if not layer.spreadable and (not even or len({size for size in sizes if size}) > 1):
        raise PlanError(
            f"the plan leaves {sizes} heads in the groups of layer {layer.index} ({layer.name}), whose code wants as "
            "many in each; remove as many from each (--unit query) or whole groups (--unit group)"
        )
    maps = len(layer.maps[0])
    groups = layer.num_heads * maps // layer.num_key_value_heads
    shared = heads * maps // keys if even else 1
    width = layer.num_heads * layer.value_dim
    meanings = [
        (HEAD_COUNTS, {layer.num_heads * maps: heads * maps}),
        (KEY_COUNTS, {layer.num_key_value_heads: keys}),
        (_GROUPS, {groups: shared, 1: shared}),
        (_WIDTHS if editor.habits.widths_count else (), {width: heads * layer.value_dim}),
    ]
    values = {attribute: change for attributes, change in meanings for attribute in attributes}
    touched = {part.module for part in layer.slices}
    parents = {name.rpartition(".")[0] for name in touched - {layer.block}}
    for name in {layer.name, layer.block} | touched | parents:
        own = vars(editor.find(name))
        for attribute, change in values.items():
            if own.get(attribute) in change and change[own[attribute]] != own[attribute]:
                editor.set(name, attribute, change[own[attribute]])
    _own_config(editor, layer.block, {"num_attention_heads": heads * maps, "num_key_value_heads": keys})
    if not even:
        editor.set(layer.name, "key_value_index", list(mapping))
    elif "key_value_index" in vars(editor.find(layer.name)):
        editor.set(layer.name, "key_value_index", None)


def _own_config(editor: Editor, block: str, values: dict[str, int]) -> None:
    """Give the modules of a block that have a config one of their own, for some code counts heads by that."""
    for inside, module in editor.find(block).named_modules():
        config = vars(module).get("config")
        if known := {key: value for key, value in values.items() if config_value(config, key) is not None}:
            editor.set(".".join(filter(None, (block, inside))), "own_config", known)
