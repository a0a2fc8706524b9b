"""Manifests of one root, each read once by a process, and many of them at once.

A task names the outputs that it depends on by the digests of their manifests. A large run has hundreds, each a request
of some ten milliseconds, which is why they can be read ahead together.
"""

from collections.abc import Iterable, Mapping

from cbtm import manifest as manifests
from cbtm import storage
from cbtm.errors import ManifestError
from cbtm.manifest import Manifest, StageSpec


class ManifestCache:
    """Manifests below `root` as they were when they were read.

    Args:
        root: Folder or s3:// prefix of the run.
    """

    def __init__(self, root: str) -> None:
        self._root = root
        self._found: dict[str, Manifest] = {}

    def load(self, spec: StageSpec) -> Manifest:
        """Manifest of an output that is to be there.

        Raises:
            ManifestError: If it is not there, or belongs to another configuration or other inputs.
        """
        found = self._found.get(spec.manifest_uri)
        if found is None or not manifests.answers(found, spec):  # it may have been made anew since
            found = manifests.load(spec.manifest_uri)
        if not manifests.answers(found, spec):
            raise ManifestError(
                f"{spec.manifest_uri} belongs to another configuration or other inputs; run stage {spec.stage} again"
            )
        self._found[spec.manifest_uri] = found
        return found

    def digests(self, specs: Mapping[str, StageSpec]) -> dict[str, str]:
        """Identity of each of several outputs that are to be there.

        Raises:
            ManifestError: As `load` does.
        """
        self.read_ahead(specs.values())
        return {name: self.load(spec).digest for name, spec in specs.items()}

    def read_ahead(self, specs: Iterable[StageSpec]) -> None:
        """Read the manifests of several outputs at once, those that are there; `load` waits for none of them then."""
        uris = [spec.manifest_uri for spec in list(specs)]  # all first: to tell one may have loaded another
        uris = [uri for uri in uris if uri not in self._found]
        names = [uri.removeprefix(f"{self._root}/") for uri in uris]
        for name, found in manifests.load_each(self._root, names).items():
            if found is not None:
                self._found[storage.join(self._root, name)] = found
