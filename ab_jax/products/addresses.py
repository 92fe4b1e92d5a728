"""From what a pass finds to products with addresses.

The address of a product is the path of the weight that enters it. Where two activations meet, as in
attention, it is what is common to the paths of the weights just above, and `product`.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from ab_jax.products.marks import address_of
from ab_jax.products.origins import Key, Origin
from ab_jax.products.product import LEFT_RIGHT, Kind, Product

# Frames of these packages are not where a model calls its layers.
_FRAMEWORKS = ("jax", "jaxlib", "flax", "equinox", "haiku", "jaxtyping")
_NOT_OF_MODELS = (
    *(f"/site-packages/{name}/" for name in _FRAMEWORKS),
    *("/ab_jax/products/", "/ab_jax/linen_layers.py", "/contextlib.py", "/functools.py"),
)


_WEIGHTS = {"kernel", "weight", "w", "embedding"}
# Layers in the name of an operand that comes from several, as a cache of keys and values does.
_MOST_NAMES = 3


@dataclasses.dataclass(frozen=True)
class Found:
    """An equation that is a product or a mark, and where it stands.

    Attributes:
      equation: of the jaxpr.
      origins: of its operands.
      key: of the equation.
      scans: around it, the outermost first, with their lengths.
      mesh_axes, apart, opaque: see `Product`.
      line: file and line of the model.
    """

    equation: Any
    origins: tuple[Origin, ...]
    key: Key
    scans: tuple[tuple[Key, int], ...]
    mesh_axes: tuple[str, ...]
    apart: frozenset[str]
    opaque: str | None
    line: str

    @property
    def mark(self) -> str | None:
        """The address that it was marked with."""
        is_name = self.equation.primitive.name == "name"
        return address_of(self.equation.params["name"]) if is_name else None


def in_framework(file: str) -> bool:
    """Whether a file is one of a framework, and not of a model."""
    return any(part in file for part in _NOT_OF_MODELS)


def model_line(equation: Any) -> str:
    """File and line of the model that an equation stems from; empty if that is unknown."""
    traceback = equation.source_info.traceback
    for frame in traceback.frames if traceback else ():
        if not in_framework(frame.file_name):
            return f"{frame.file_name}:{frame.line_num}"
    return ""


def named(found: Mapping[Key, Found], shapes: Mapping[str, tuple[int, ...]]) -> tuple[Product, ...]:
    """The products with their addresses, in the order of the program.

    Args:
      found: by key.
      shapes: of the parameters, by path.
    """
    listed: list[Key] = []
    by_key: dict[Key, Product] = {}
    uses: dict[str, int] = {}
    # A scan in which one weight is sliced runs over layers, and each layer has its own of all else.
    layers = {scan for one in found.values() for o in one.origins if not o.data for scan in o.scans}
    for key in sorted(found):
        product = _unnamed(found[key], shapes, layers)
        base = _base(product, found, by_key)
        mark = _mark_of(found[key], base, by_key)
        if mark is not None:  # seen, but marked already
            by_key[key] = mark
            if mark.followed_by is None:
                product = dataclasses.replace(product, address=mark.address)
                by_key[mark.key] = dataclasses.replace(
                    mark,
                    weight=product.weight,
                    channel_axes=product.channel_axes,
                    followed_by=product,
                )
            continue
        count = uses[base] = uses.get(base, -1) + 1
        address = f"{base}#{count}" if count else base
        operands = _operands(found[key], product, by_key)
        by_key[key] = dataclasses.replace(product, address=address, operands=operands)
        listed.append(key)
    return tuple(by_key[key] for key in listed)


def _mark_of(found: Found, base: str, by_key: Mapping[Key, Product]) -> Product | None:
    """The mark that this product would have, had it not been seen."""
    for origin in found.origins if found.mark is None else ():
        for key in origin.above:
            if (
                key in by_key
                and by_key[key].kind == "marked"
                and by_key[key].address.partition("#")[0] == base
            ):
                return by_key[key]
    return None


def _unnamed(found: Found, shapes: Mapping[str, tuple[int, ...]], layers: set[Key]) -> Product:
    equation, origins = found.equation, found.origins
    operands = equation.invars if found.opaque else equation.invars[:2]
    origins = origins[: len(operands)]
    data, kind = _kind(found, origins)
    contracted = _contracted(equation)
    weight = channels = None
    if kind in ("weight", "parameter") or (found.opaque and kind != "activation"):
        side, weight = _weight(found, data, shapes)
        if weight is not None and contracted:
            channels = _channel_axes(
                origins[side], weight, shapes[weight], contracted[side], operands[side].aval.shape
            )
    scans = [scan for scan in found.scans if scan[0] in layers]
    if kind in ("weight", "parameter"):  # a weight that is not sliced is the same in all of them
        own = frozenset().union(*(o.scans for o in origins if not o.data))
        scans = [scan for scan in scans if scan[0] in own]
    return Product(
        address="",
        kind=kind,
        primitive=found.opaque or ("mark" if found.mark else equation.primitive.name),
        shapes=tuple(v.aval.shape for v in operands),
        dtypes=tuple(v.aval.dtype for v in operands),
        data=data,
        weight=weight,
        channel_axes=channels,
        contracted=contracted,
        stack=tuple(length for _, length in scans),
        where=found.line,
        opaque=found.opaque,
        mesh_axes=found.mesh_axes,
        varies=tuple(origin.varies for origin in origins),
        apart=found.apart,
        operands=LEFT_RIGHT,
        params=equation.params,
        key=found.key,
        stacked_by=tuple(scan for scan, _ in scans),
    )


def _kind(found: Found, origins: Sequence[Origin]) -> tuple[tuple[int, ...], Kind]:
    """Which operands are data, and what the product is."""
    data = tuple(i for i, origin in enumerate(origins) if origin.data)
    if found.mark is not None:
        return (0,), "marked"
    looked_up = [i for i in data if origins[i].looked_up]
    if len(data) == 2 and len(looked_up) == 1:  # the weights of experts, picked by the data
        return tuple(i for i in data if i not in looked_up), "weight"
    if len(data) >= 2 and not any(o.leaves for o in origins if not o.data):
        return data, "activation"
    others = [origin for origin in origins if not origin.data]
    if any(origin.leaves for origin in others):
        return data, "weight" if data else "parameter"
    return data, "constant"


def _weight(
    found: Found, data: Sequence[int], shapes: Mapping[str, tuple[int, ...]]
) -> tuple[int, str | None]:
    """The operand that is no data, and the parameter in it: of several the one as large.

    Weights may be made of several: a direction and a length, a sum with adapters.
    """
    best: tuple[float, int, str | None] = (math.inf, 0, None)
    for side, origin in enumerate(found.origins):
        if side in data or side >= len(found.equation.invars):
            continue
        size = math.prod(getattr(found.equation.invars[side].aval, "shape", ()))
        size *= math.prod(length for scan, length in found.scans if scan in origin.scans)
        for path in sorted(origin.leaves):
            best = min(best, (abs(math.prod(shapes[path]) - size), side, path))
    return best[1], best[2]


def _contracted(equation: Any) -> tuple[tuple[int, ...], ...]:
    """For each operand the axes that are summed over; of images all but the batch."""
    params = equation.params
    match equation.primitive.name:
        case "dot_general":
            return tuple(tuple(axes) for axes in params["dimension_numbers"][0])
        case "conv_general_dilated":
            numbers = params["dimension_numbers"]
            return tuple(numbers.lhs_spec[1:]), tuple(numbers.rhs_spec[1:])
        case "ragged_dot_general":
            numbers = params["ragged_dot_dimension_numbers"].dot_dimension_numbers
            return tuple(tuple(axes) for axes in numbers[0])
        case "name":
            axes = range(1, equation.invars[0].aval.ndim)
            return (tuple(axes),)
    return ()


def _channel_axes(
    origin: Origin,
    path: str,
    shape: tuple[int, ...],
    contracted: Sequence[int],
    operand: Sequence[int],
) -> tuple[int, ...] | None:
    """The axes of a parameter over which an operand that is made of it is not summed."""
    axes = origin.leaves[path]
    summed = [axes[i] for i in contracted if operand[i] != 1]
    if not all(summed):
        return None
    gone = frozenset[int]().union(*summed)
    return tuple(i for i in range(len(shape)) if i not in gone)


def _base(product: Product, found: Mapping[Key, Found], by_key: Mapping[Key, Product]) -> str:
    """The address without a count."""
    match product.kind:
        case "marked":
            return found[product.key].mark or ""
        case "parameter":
            return "parameters"
        case "weight" if product.weight is not None:
            return product.weight
        case "activation" | "weight":
            paths = [path.split("/") for path in _weights_above(product.key, found, by_key)]
            parents = [path[:-1] or path for path in paths]
            return "/".join([*_common(parents), "product"])
    return product.weight or "constant"


def _weights_above(
    key: Key,
    found: Mapping[Key, Found],
    by_key: Mapping[Key, Product],
    seen: frozenset[Key] = frozenset(),
) -> set[str]:
    """The paths of the nearest weights before a product; through products that have none."""
    paths: set[str] = set()
    for above in frozenset[Key]().union(*(origin.above for origin in found[key].origins)):
        product = by_key.get(above)
        if product is None or above in seen:  # later in a loop
            continue
        own = product.weight or (product.address if product.kind == "marked" else None)
        paths |= {own} if own else _weights_above(above, found, by_key, seen | {key})
    return paths


def _operands(found: Found, product: Product, by_key: Mapping[Key, Product]) -> tuple[str, ...]:
    """Names of the operands: of two activations what each comes from, where that differs.

    As `query` and `key`, or `product` and `value`: which of them a function writes first a jaxpr
    does not tell.
    """
    if product.kind != "activation" or len(product.data) != 2:
        return LEFT_RIGHT
    names = []
    for side in product.data:
        above = {
            by_key[key].address.partition("#")[0]
            for key in found.origins[side].above
            if key in by_key
        }
        names.append("_".join(sorted(map(_layer, above))[:_MOST_NAMES]))
    return tuple(names) if all(names) and len(set(names)) == 2 else LEFT_RIGHT


def _layer(address: str) -> str:
    """The last name in an address, but for what frameworks call the weight of a layer."""
    *parents, last = address.split("/")
    return parents[-1] if parents and last in _WEIGHTS else last


def _common(paths: Sequence[Sequence[str]]) -> list[str]:
    """The keys with which all paths begin."""
    common = []
    for keys in zip(*paths, strict=False):
        if len(set(keys)) > 1:
            break
        common.append(keys[0])
    return common
