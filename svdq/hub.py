"""Fetch a published SVDQ file from Hugging Face. Nothing here runs at import, and nothing is fetched unasked."""

import inspect
from pathlib import Path

from .errors import CheckpointError


def download(repo_id, filename, revision, folder, *, wants_fp4, progress):
    """The local path of `filename` of a repository, fetched into `folder` unless it is there.

    filename   a .safetensors file of the repository; None picks its rank-32 FLUX file, fp4 if `wants_fp4` else int4
    progress   called with (bytes done, bytes in all); what it raises ends the download and passes through

    Raises CheckpointError when the hub has no such thing, asks for a login, cannot be reached, or the disk is full.
    """
    _check_name(repo_id, filename)
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        HTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )
    where = f"{repo_id} ({revision})"

    def unreachable():
        return CheckpointError(f"{where}: Hugging Face cannot be reached, and {filename or 'no file'} is not in "
                               f"{folder}. Check the connection, or put the file there and use 'Load SVDQ Model'")

    try:
        if filename is None:
            filename = _pick(repo_id, revision, wants_fp4)
            _check_name(repo_id, filename)              # it comes from the network
        target = Path(folder, filename)
        return str(target) if target.is_file() else _fetch(repo_id, filename, revision, folder, progress)
    except GatedRepoError as error:
        raise CheckpointError(f"{where}: this repository is gated. Accept its terms on its page, then log in with "
                              "'hf auth login' on this machine and restart ComfyUI") from error
    except RepositoryNotFoundError as error:
        raise CheckpointError(f"{where}: no such repository. Check repo_id, which is owner/name") from error
    except RevisionNotFoundError as error:
        raise CheckpointError(f"{where}: no such revision. Use 'main'") from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, ConnectionError) as error:
        raise unreachable() from error
    except EntryNotFoundError as error:
        raise CheckpointError(f"{where}: has no file {filename}. Leave filename empty to pick one") from error
    except HFValidationError as error:
        raise CheckpointError(f"repo_id '{repo_id}': {error}") from error
    except (HfHubHTTPError, OSError) as error:
        raise CheckpointError(f"{where}: the download of {filename or 'the file list'} failed: {error}") from error
    except HTTPError as error:                          # of the HTTP library underneath: no connection, or it broke
        raise unreachable() from error


def _check_name(repo_id, filename):
    if len([part for part in repo_id.split("/") if part.strip()]) != 2:
        raise CheckpointError(f"repo_id '{repo_id}': needs the form owner/name, as in nunchaku-tech/nunchaku-flux.1-dev")
    if filename is None:
        return
    parts = filename.replace("\\", "/").split("/")
    inside = ".." not in parts and "" not in parts and ":" not in filename and filename.isprintable()
    if not filename.endswith(".safetensors") or not inside:
        raise CheckpointError(f"filename '{filename}': needs the name of a .safetensors file inside the repository")


def _pick(repo_id, revision, wants_fp4):
    """The file of a repository that suits the GPU, by the published naming."""
    from huggingface_hub import HfApi

    files = [name for name in HfApi().list_repo_files(repo_id, revision=revision) if name.endswith(".safetensors")]
    prefixes = [f"svdq-{kind}_r{rank}-" for kind in (("fp4", "int4") if wants_fp4 else ("int4", "fp4")) for rank in (32, 128)]
    for prefix in prefixes:
        for name in sorted(files, key=lambda name: (name.count("/"), name)):
            if Path(name).name.startswith(prefix):
                return name
    raise CheckpointError(f"{repo_id}: holds no file named svdq-int4_... or svdq-fp4_...; it has "
                          f"{', '.join(sorted(files)[:3]) or 'no .safetensors file'}. Set filename, or another repo_id")


def _fetch(repo_id, filename, revision, folder, progress):
    from huggingface_hub import hf_hub_download
    from tqdm.auto import tqdm

    class Bar(tqdm):
        def __init__(self, *args, **kwargs):
            kwargs.pop("name", None)                    # the hub's own bars take it
            super().__init__(*args, **kwargs | {"disable": False})

        def update(self, n=1):
            super().update(n)
            progress(self.n, self.total)

    # Versions of the library without tqdm_class still download, only unseen.
    options = {"tqdm_class": Bar} if "tqdm_class" in inspect.signature(hf_hub_download).parameters else {}
    return hf_hub_download(repo_id, filename, revision=revision, local_dir=folder, **options)
