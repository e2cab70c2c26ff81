"""Platform: one machine, or the dump of one, as the rest of numagraft sees it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from numagraft.errors import ConfigurationError, PlatformError, Problem
from numagraft.platform.cgroups import read_cgroup
from numagraft.platform.cpus import read_cpus, read_l3_bytes
from numagraft.platform.facts import Cgroup, Cpu, Gpu, Kernel, MemoryModule, MemoryPolicy, Node
from numagraft.platform.gpus import read_gpus
from numagraft.platform.ids import format_list
from numagraft.platform.isa import ISA_ORDER, REQUIRED_FLAGS, CpuModel, read_cpu_model
from numagraft.platform.kernel import read_kernel
from numagraft.platform.modules import read_memory_modules
from numagraft.platform.nodes import read_node_cpus, read_nodes
from numagraft.platform.plain import from_plain, to_plain
from numagraft.platform.process import read_allowance
from numagraft.platform.tree import FolderTree, Tree, open_dump

SCHEMA = 1


@dataclass(frozen=True)
class Platform:
    """Nodes, CPUs and memory of a machine, and how much of it this process may use.

    `live` is True only for the machine this process runs on; a replayed platform plans, but never binds.
    `allowed_cpus` are online and in the affinity mask; `allowed_nodes` have memory and are in Mems_allowed, which is
    the truth where /sys shows more.
    """

    source: str
    nodes: tuple[Node, ...]
    cpus: tuple[Cpu, ...]
    allowed_cpus: tuple[int, ...]
    allowed_nodes: tuple[int, ...]
    live: bool = False
    cpu: CpuModel = field(default_factory=CpuModel)
    l3_bytes: int | None = None  # of one L3 group
    kernel: Kernel = field(default_factory=Kernel)
    policy: MemoryPolicy = field(default_factory=MemoryPolicy)
    cgroup: Cgroup = field(default_factory=Cgroup)
    memlock_bytes: int | None = None
    seccomp: int | None = None
    capabilities: int | None = None
    gpus: tuple[Gpu, ...] = ()
    memory_modules: tuple[MemoryModule, ...] = ()
    notes: tuple[str, ...] = ()  # what was strange or missing, for people

    @classmethod
    def detect(cls, fsroot: str | Path = "/") -> Platform:
        """Reads sysfs and procfs under `fsroot`: this machine's "/", or a folder or archive with a copy of another's.

        Never fails on strange contents: what cannot be read is unknown, and an unknown topology is one node with all
        allowed CPUs. Raises PlatformError when `fsroot` itself is no such folder or archive.
        """
        tree = FolderTree("/") if str(fsroot) == "/" else open_dump(fsroot)
        return cls.read(tree)

    @classmethod
    def from_dump(cls, path: str | Path) -> Platform:
        """Another machine: a folder, an archive (hwloc-gather-topology's), or a .json of `to_json`.

        Raises PlatformError when it cannot be read.
        """
        if Path(path).suffix == ".json":
            try:
                return cls.from_json(Path(path).read_text(encoding="utf-8"))
            except (OSError, UnicodeDecodeError) as error:
                raise PlatformError("cannot read the platform", [Problem(str(path), str(error))]) from error
        return cls.read(open_dump(path))

    @classmethod
    def read(cls, tree: Tree) -> Platform:
        """The machine whose files `tree` holds."""
        notes = []
        node_cpus = read_node_cpus(tree)
        cpus = read_cpus(tree, node_cpus)
        if not any(cpu.online for cpu in cpus):
            cpus = (Cpu(0, node=0, socket=0, core=0),)
            notes.append("no CPU is described: one is assumed")
        if not node_cpus:
            notes.append("the kernel tells of no NUMA nodes: one node is assumed to hold all CPUs")
        nodes = read_nodes(tree, node_cpus, cpus)
        if not node_cpus:
            cpus = tuple(_on_node_0(cpu) for cpu in cpus)
        allowance = read_allowance(tree)
        online = [cpu.id for cpu in cpus if cpu.online]
        allowed_cpus = _allowed(online, allowance.cpus, "CPU", notes)
        with_memory = [node.id for node in nodes if node.has_memory]
        if not with_memory:
            notes.append("no node tells how much memory it has")
            with_memory = [node.id for node in nodes]
        allowed_nodes = _allowed(with_memory, allowance.nodes, "memory node", notes)
        node_ids = {node.id for node in nodes}
        lost = [cpu.id for cpu in cpus if cpu.online and cpu.node not in node_ids]
        if lost:
            notes.append(f"CPUs {format_list(lost)} belong to no online node and are left alone")
        model = read_cpu_model(tree)
        if not model.features:
            notes.append("no CPU features are described: only the scalar kernels are known to run")
        return cls(
            source=tree.name,
            nodes=nodes,
            cpus=cpus,
            allowed_cpus=allowed_cpus,
            allowed_nodes=allowed_nodes,
            live=tree.live,
            cpu=model,
            l3_bytes=read_l3_bytes(tree, cpus),
            kernel=read_kernel(tree, tuple(online)),
            policy=allowance.policy,
            cgroup=read_cgroup(tree),
            memlock_bytes=allowance.memlock_bytes,
            seccomp=allowance.seccomp,
            capabilities=allowance.capabilities,
            gpus=read_gpus(tree),
            memory_modules=read_memory_modules(tree),
            notes=tuple(notes),
        )

    @classmethod
    def virtual(
        cls,
        nodes: int,
        *,
        cores_per_node: int = 1,
        threads_per_core: int = 1,
        sockets: int | None = None,
        memory_per_node: int = 64 << 30,
        isa: Sequence[str] = ("avx2",),
    ) -> Platform:
        """A made-up machine to plan for; `isa` are kernel rows it can run. It never binds.

        Raises ConfigurationError for counts below one, sockets that do not divide the nodes, or an unknown ISA.
        """
        sockets = sockets if sockets is not None else nodes
        counts = {"nodes": nodes, "cores_per_node": cores_per_node, "threads_per_core": threads_per_core}
        problems = [
            Problem(name, f"{count} is not a positive number")
            for name, count in {**counts, "sockets": sockets}.items()
            if count < 1
        ]
        if not problems and nodes % sockets:
            problems.append(Problem("sockets", f"{nodes} nodes do not divide over {sockets} sockets"))
        problems += [
            Problem("isa", f"unknown ISA {row!r}", f"known: {', '.join(ISA_ORDER)}")
            for row in isa
            if row not in ISA_ORDER
        ]
        if problems:
            raise ConfigurationError("no such virtual platform", problems)
        cores = nodes * cores_per_node
        cpus = tuple(
            Cpu(
                id=thread * cores + core,
                node=core // cores_per_node,
                socket=core // cores_per_node // (nodes // sockets),
                core=core,
                l3=core // cores_per_node * cores_per_node,
            )
            for thread in range(threads_per_core)
            for core in range(cores)
        )
        socket_of = [node // (nodes // sockets) for node in range(nodes)]
        return cls(
            source=f"virtual: {nodes} nodes",
            nodes=tuple(
                Node(
                    id=node,
                    cpus=tuple(cpu.id for cpu in cpus if cpu.node == node),
                    socket=socket_of[node],
                    total_bytes=memory_per_node,
                    free_bytes=memory_per_node,
                    distances={
                        other: 10 if other == node else 12 if socket_of[other] == socket_of[node] else 21
                        for other in range(nodes)
                    },
                )
                for node in range(nodes)
            ),
            cpus=cpus,
            allowed_cpus=tuple(cpu.id for cpu in cpus),
            allowed_nodes=tuple(range(nodes)),
            cpu=CpuModel(
                features=tuple(sorted({flag for row in isa if row != "scalar" for flag in REQUIRED_FLAGS[row]}))
            ),
        )

    @cached_property
    def _cpu_by_id(self) -> dict[int, Cpu]:
        return {cpu.id: cpu for cpu in self.cpus}

    def node(self, id: int) -> Node:
        """Raises ConfigurationError naming the nodes there are."""
        for node in self.nodes:
            if node.id == id:
                return node
        raise ConfigurationError(
            f"no NUMA node {id} on this platform", [Problem("", f"nodes: {format_list(n.id for n in self.nodes)}")]
        )

    @property
    def usable_nodes(self) -> tuple[int, ...]:
        """Nodes where this process may both compute and hold memory."""
        with_cpus = {self._cpu_by_id[cpu].node for cpu in self.allowed_cpus}
        return tuple(node for node in self.allowed_nodes if node in with_cpus)

    @property
    def memory_only_nodes(self) -> tuple[int, ...]:
        """Allowed nodes with memory but no CPU at all (CXL, HBM in flat mode): used only when listed."""
        return tuple(node.id for node in self.nodes if node.id in self.allowed_nodes and not node.cpus)

    @property
    def sockets(self) -> tuple[int, ...]:
        return tuple(sorted({cpu.socket for cpu in self.cpus if cpu.online and cpu.socket is not None})) or (0,)

    @property
    def nodes_per_socket(self) -> int:
        """Nodes with CPUs on the socket that has most of them: above 1 under NPS2/NPS4 or sub-NUMA clustering."""
        counts: dict[int | None, int] = {}
        for node in self.nodes:
            if node.cpus:
                counts[node.socket] = counts.get(node.socket, 0) + 1
        return max(counts.values(), default=1)

    @property
    def isa(self) -> tuple[str, ...]:
        """Kernel rows that can run here, widest first; the native backend says which one it really uses."""
        return self.cpu.isa

    def supports(self, name: str) -> bool:
        """Whether a kernel row ("avx512_vnni") or a CPU feature ("avx512_bf16") is usable."""
        return name in self.isa or (name in self.cpu.features and name not in self.cpu.blocked)

    def cores(self, node: int | None = None, *, allowed: bool = True) -> tuple[tuple[int, ...], ...]:
        """Physical cores as the tuples of their logical CPUs, by lowest CPU; of one node, and only allowed CPUs."""
        chosen = set(self.allowed_cpus) if allowed else {cpu.id for cpu in self.cpus if cpu.online}
        cores: dict[int, list[int]] = {}
        for cpu in self.cpus:
            if cpu.id in chosen and (node is None or cpu.node == node):
                cores.setdefault(cpu.id if cpu.core is None else cpu.core, []).append(cpu.id)
        return tuple(tuple(core) for core in sorted(cores.values()))

    def available_bytes(self) -> dict[int, int]:
        """Allowed node -> bytes an allocation there can get, cut to what the control group leaves to all of them."""
        available = {node.id: node.available_bytes for node in self.nodes if node.id in self.allowed_nodes}
        left = self.cgroup.memory_available
        if left is not None:
            available = {node: min(amount, left) for node, amount in available.items()}
        return available

    def to_json(self, *, indent: int | None = None) -> str:
        """JSON with a `schema` number; `from_json` reads it back equal, but never live."""
        return json.dumps({"schema": SCHEMA, **to_plain(self)}, indent=indent)

    @classmethod
    def from_json(cls, text: str) -> Platform:
        """Raises PlatformError with every field that is wrong."""
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise PlatformError("not a platform", [Problem("", f"not JSON: {error}")]) from error
        if isinstance(data, dict) and isinstance(data.get("platform"), dict):
            data = data["platform"]  # what `numagraft doctor --json` prints
        if not isinstance(data, dict) or data.get("schema") != SCHEMA:
            found = data.get("schema") if isinstance(data, dict) else type(data).__name__
            raise PlatformError(
                "not a platform",
                [Problem("schema", f"expected {SCHEMA}, found {found!r}", "`numagraft doctor --json` writes one")],
            )
        problems: list[Problem] = []
        fields = {name: value for name, value in data.items() if name != "schema"}
        # Whoever reads a file may sit on another machine, or on the same one in another container.
        platform = from_plain(cls, {**fields, "live": False}, problems)
        if not problems and platform is not None:
            problems = platform._contradictions()
        if problems or platform is None:
            raise PlatformError("not a platform", problems)
        return platform

    def _contradictions(self) -> list[Problem]:
        cpus, nodes = {cpu.id for cpu in self.cpus}, {node.id for node in self.nodes}
        problems = []
        if not nodes:
            problems.append(Problem("nodes", "is empty"))
        for name, known in (("allowed_cpus", cpus), ("allowed_nodes", nodes)):
            numbers = getattr(self, name)
            strange = sorted(set(numbers) - known)
            if strange:
                problems.append(Problem(name, f"{format_list(strange)} do not exist"))
            if not numbers:
                problems.append(Problem(name, "is empty"))
        return problems


def _allowed(there: Sequence[int], allowed: Sequence[int] | None, what: str, notes: list[str]) -> tuple[int, ...]:
    if allowed is None:
        return tuple(there)
    chosen = set(allowed)
    both = tuple(number for number in there if number in chosen)
    if not both:
        notes.append(f"none of the {what}s {format_list(there)} is allowed ({format_list(allowed)}): taken as unknown")
        return tuple(there)
    return both


def _on_node_0(cpu: Cpu) -> Cpu:
    return Cpu(cpu.id, cpu.online, 0 if cpu.online else None, cpu.socket, cpu.core, cpu.l3)
