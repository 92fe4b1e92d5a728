"""Published figures of accelerators, and how long an all-reduce takes on their links."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """One kind of accelerator, in its maker's figures.

    Attributes:
      name: as its maker calls it.
      flops: multiply-adds count twice, bfloat16, dense, per second.
      memory: bytes of its own memory.
      memory_rate: bytes per second to and from it.
      island: how many chips fast links connect.
      link_rate: bytes per second that a chip can send over them, all its links together.
      network_rate: bytes per second that a chip can send to other islands.
      source: of the figures.
    """

    name: str
    flops: float
    memory: float
    memory_rate: float
    island: int
    link_rate: float
    network_rate: float
    source: str


CHIPS = {
    # 1600 Gbit/s a chip over four links, in each direction (the maker also writes 400 GB/s for
    # both). 6.4 Tbit/s to other slices, for a slice of 256.
    "v5e": Chip(
        name="TPU v5e",
        flops=197e12,
        memory=16e9,
        memory_rate=819e9,
        island=256,
        link_rate=1600e9 / 8,
        network_rate=6.4e12 / 8 / 256,
        source="cloud.google.com/tpu/docs/v5e",
    ),
    # NVLink's 900 GB/s count both directions. Between hosts one 400 Gbit/s adapter a GPU, as in
    # hosts of eight such as DGX H100.
    "h100": Chip(
        name="H100 SXM",
        flops=989e12,
        memory=80e9,
        memory_rate=3.35e12,
        island=8,
        link_rate=900e9 / 2,
        network_rate=400e9 / 8,
        source="nvidia.com/en-us/data-center/h100",
    ),
}


def ring_bytes(size: float, members: int) -> float:
    """Bytes that each member of a ring sends to sum `size` bytes over all: 2 (n - 1) / n of them.

    A reduce-scatter sends n - 1 of n parts on, an all-gather as many again; no algorithm sends less
    (Patarasuk and Yuan, 2009).
    """
    return 2 * (members - 1) / members * size


def all_reduce_parts(size: float, chips: int, chip: Chip) -> list[tuple[str, float, float]]:
    """How an all-reduce is made of transfers: `(where, bytes each chip sends, bytes per second)`.

    Within an island a ring over all its links. Between islands a ring too, each chip with the part
    of its island's sum that the reduce-scatter within it has left there.

    Args:
      size: bytes to sum.
      chips: a multiple of the chip's island, or less than one.

    Raises:
      ValueError: chips that do not fill their islands.
    """
    if chips < 1 or (chips > chip.island and chips % chip.island):
        raise ValueError(
            f"--chips={chips} does not fill islands of {chip.island} x {chip.name}. Choose 1 to "
            f"{chip.island}, or a multiple of {chip.island}."
        )
    inside = min(chips, chip.island)
    parts = [(f"within {inside} chips", ring_bytes(size, inside), chip.link_rate)]
    if chips > inside:
        islands = chips // inside
        sent = ring_bytes(size / inside, islands)
        parts.append((f"between {islands} groups of {inside}", sent, chip.network_rate))
    return parts
