"""Fetch a published SVDQ file from Hugging Face, or say whether the file already there is it. Nothing here runs at import, and
nothing is fetched unasked."""

import inspect
import os
import re
from pathlib import Path

from .errors import CheckpointError, shown
from .files import folders_in_front, new_name, read_text
from .ways_out import way_out

TIMEOUT = 10        # seconds without an answer
REPOSITORIES = [f"nunchaku-tech/nunchaku-flux.1-{name}" for name in
                ("dev", "schnell", "krea-dev", "kontext-dev", "fill-dev", "canny-dev", "depth-dev")]
LONGEST = 300       # characters of a file's name and its folders


def download(repo_id, filename, revision, folder, *, wants_fp4, progress, say=lambda text: None):
    """(path, notice) of `filename` of a repository at a revision, fetched into `folder` unless a file of that name is there.

    A file that is there is never changed. It must have the size of the repository's, and its hash if huggingface_hub noted
    one when it fetched it; notice is None, or says why that could not be asked.

    filename   a .safetensors file of the repository; empty picks its rank-32 FLUX file, fp4 if `wants_fp4` else int4. Where
               that is there by its published name, nobody lists the repository; where the hub cannot be reached, another
               rank or precision that is there serves
    progress   called with (bytes done, bytes in all); what it raises ends the download and passes through
    say        called with what is being waited for, for people

    Raises CheckpointError when the file there is another one, the hub has no such thing, asks for a login or cannot be
    reached, or the disk is full.
    """
    repo_id, revision, filename = repo_id.strip(), revision.strip(), (filename or "").strip()
    _check_repository(repo_id, revision)
    raised = []                         # by progress: a library in between may take it for its own, or lose it

    def told(done, total):
        try:
            progress(done, total)
        except BaseException as error:
            raised.append(error)
            raise

    try:
        # Checked in both cases: the one comes from a user, the other from the network
        filename, silence = (filename, None) if filename else _found(repo_id, revision, folder, wants_fp4, say)
        filename = _checked(filename)
        target = Path(folder, filename)
        if silence:
            path, notice = str(target), _uncertain(target, repo_id, revision, _unasked(silence))
        elif os.path.lexists(target):
            say(f"asking Hugging Face whether {filename} is the one of {repo_id}")
            path, notice = str(target), _doubt(repo_id, filename, revision, folder)
        else:
            say(f"downloading {filename} of {repo_id}")
            path, notice = _fetch(repo_id, filename, revision, folder, told), None
    except CheckpointError:
        raise
    except Exception as error:          # the hub, the proxies before it and three libraries may raise anything
        if raised:
            raise raised[0]             # noqa: B904
        raise CheckpointError(f"{repo_id} ({revision}): {_why(error, filename, folder)}") from error
    if raised:
        raise raised[0]
    return path, notice


def cached(repo_id, filename, revision, *, subfolder=None, cache_dir=None, local_files_only=False, token=None,
           wants_fp4=False, legacy=()):
    """The path of a repository's SVDQ file in Hugging Face's cache, fetched unless it is there; of a legacy model its folder.

    filename   see `download`; None: a file of the published naming that is in the cache, else as the repository lists them
    legacy     the files of a legacy folder: a repository that has the first of them is one

    Raises CheckpointError as `download` does.
    """
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download

    _check_repository(repo_id, revision)
    options = {"revision": revision, "cache_dir": cache_dir, "token": token}
    prefix = f"{subfolder.strip('/')}/" if subfolder else ""
    try:
        if filename is None:
            here = _cached_name(repo_id, prefix, wants_fp4, options, legacy)
            if here is not None:
                return here
            if local_files_only:
                raise CheckpointError(f"{repo_id} ({revision}): {_not_cached(filename, local_files_only)}")
            siblings = HfApi(token=token).model_info(repo_id, revision=revision, timeout=TIMEOUT).siblings or []
            names = [file.rfilename for file in siblings if file.rfilename.startswith(prefix)]
            if legacy and f"{prefix}{legacy[0]}" in names:
                root = snapshot_download(repo_id, allow_patterns=[f"{prefix}{name}" for name in legacy], **options)
                return os.path.join(root, prefix)
            filename = _chosen(repo_id, names, wants_fp4).removeprefix(prefix)
        return hf_hub_download(repo_id, _checked(f"{prefix}{filename}"), local_files_only=local_files_only, **options)
    except CheckpointError:
        raise
    except Exception as error:          # as in `download`
        why = _answer(error, filename) or _not_cached(filename, local_files_only)
        raise CheckpointError(f"{repo_id} ({revision}): {why}") from error


def _not_cached(filename, local_files_only):
    what = f"{filename or 'the model'} is not in the cache of this machine"
    if local_files_only:
        return f"{what}, and local_files_only is set. Leave that out, or give the path of the file"
    return f"Hugging Face cannot be reached, and {what}. Check the connection, or give the path of the file"


def _cached_name(repo_id, prefix, wants_fp4, options, legacy):
    """The path of what the cache has of a repository by the published naming, or None."""
    from huggingface_hub import try_to_load_from_cache

    options = {name: value for name, value in options.items() if name != "token"}
    if legacy:
        found = [try_to_load_from_cache(repo_id, f"{prefix}{name}", **options) for name in legacy[:2]]
        if all(isinstance(path, str) for path in found):
            return os.path.dirname(found[0])
    model = repo_id.partition("/")[2].removeprefix("nunchaku-")
    names = (f"{start}{model}.safetensors" for start in _prefixes(wants_fp4)[:1])
    found = (try_to_load_from_cache(repo_id, f"{prefix}{name}", **options) for name in names)
    return next((path for path in found if isinstance(path, str)), None)


def _found(repo_id, revision, folder, wants_fp4, say):
    """(name of the file that suits the GPU, None): the one that is there, else as the hub lists it; (name of another file of
    the repository that is there, the exception) where the hub does not answer."""
    for name in _there(repo_id, folder, _prefixes(wants_fp4)[:1]):
        return name, None
    say(f"asking Hugging Face which files {repo_id} has")
    try:
        return _pick(repo_id, revision, wants_fp4), None
    except Exception as error:
        for name in _there(repo_id, folder, _prefixes(wants_fp4)) if _answer(error, "") is None else ():
            return name, error
        raise


def _there(repo_id, folder, prefixes):
    """Names of the files of a repository that are in the folder, by the published naming: owner/nunchaku-NAME holds
    svdq-int4_r32-NAME.safetensors."""
    model = repo_id.partition("/")[2].removeprefix("nunchaku-")
    return (name for name in (f"{prefix}{model}.safetensors" for prefix in prefixes) if Path(folder, name).is_file())


def _prefixes(wants_fp4):
    """How published files begin, the best first."""
    return [f"svdq-{kind}_r{rank}-" for kind in (("fp4", "int4") if wants_fp4 else ("int4", "fp4")) for rank in (32, 128)]


def _answer(error, filename):
    """What an exception of the network means, and what to do; None if nobody answered."""
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        HTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )
    rows = [                            # the first that fits: many of these are subclasses of later ones
        (GatedRepoError, f"this repository is gated. Accept its terms on its page, then {way_out('gated')}"),
        (RepositoryNotFoundError, "no such repository, or a private one. Check repo_id, which is owner/name, or "
                                  f"{way_out('private')}"),
        (RevisionNotFoundError, "no such revision. Use 'main'"),
        ((LocalEntryNotFoundError, OfflineModeIsEnabled, ConnectionError), None),
        (EntryNotFoundError, f"has no file {filename}. {way_out('no such file')}"),
        ((HfHubHTTPError, OSError), f"the download of {filename or 'the file list'} failed: {_said(error)}"),
        (HTTPError, None),              # of the HTTP library underneath: no connection, or it broke
        (Exception, f"the download of {filename or 'the file list'} failed: {_said(error)}")]
    if _unanswered(error):
        return None
    return next(text for kind, text in rows if isinstance(error, kind))


def _unanswered(error):
    """Whether the HTTP library under huggingface_hub 0.x says that no answer came; its exceptions are OSErrors, too."""
    return (any(kind.__module__.partition(".")[0] == "requests" for kind in type(error).__mro__)
            and getattr(error, "response", None) is None and not isinstance(error, ValueError))     # an answer that is no JSON


def _why(error, filename, folder):
    return _answer(error, filename) or (
        f"Hugging Face cannot be reached, and {filename} is not in {folder}. Check the connection, or put the file there and "
        "use 'SVDQ Loader'" if filename else
        f"Hugging Face cannot be reached to pick a file, and none of this model is in {folder}. Check the connection, or put "
        "the file there")


def _said(error):
    return shown(" ".join(str(error).split()) or type(error).__name__, 300)


def _check_repository(repo_id, revision):
    if not re.fullmatch(r"[\w.-]{1,96}/[\w.-]{1,96}", repo_id):
        raise CheckpointError(f"repo_id '{shown(repo_id)}': needs the form owner/name, as in "
                              "nunchaku-tech/nunchaku-flux.1-dev")
    if not re.fullmatch(r"[\w.+#@=/-]{1,200}", revision) or ".." in revision:
        raise CheckpointError(f"revision '{shown(revision)}': needs the name of a branch or tag or a commit. Use 'main'")


def _checked(filename):
    if not filename.endswith(".safetensors") or len(filename) > LONGEST:
        raise CheckpointError(f"filename '{shown(filename)}': needs the name of a .safetensors file inside the repository, of "
                              f"{LONGEST} characters at most")
    try:
        return str(new_name(filename, "svdq-int4_r32-flux.1-dev.safetensors", ".safetensors", folders=True))
    except CheckpointError as error:
        raise CheckpointError(f"filename {error}") from error


def _doubt(repo_id, filename, revision, folder):
    """Why nobody can say that the file there is the repository's; None if it is. Raises CheckpointError if it is not."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )
    target, there = Path(folder, filename), f"{filename} of {repo_id} ({revision})"
    if not target.is_file():
        raise CheckpointError(f"{target}: a folder, a device or a broken link has the name of the file to download. Rename or "
                              "remove it")
    commit, noted = _note(folder, filename)
    try:
        remote = get_hf_file_metadata(hf_hub_url(repo_id, filename, revision=revision), timeout=TIMEOUT)
        doubt = None if remote.commit_hash else ("what answered in the place of Hugging Face is something else, a proxy or a "
                                                 "login page")
    except Exception as error:                          # as above; whatever it is, the file can be used without an answer
        if (isinstance(error, (RepositoryNotFoundError, RevisionNotFoundError, EntryNotFoundError))
                and not isinstance(error, (GatedRepoError, LocalEntryNotFoundError))):
            raise                                       # this is an answer: the file there cannot be of such a thing
        doubt = _unasked(error)
    if doubt is None:
        size, difference = target.stat().st_size, None
        if remote.size is not None and remote.size != size:
            difference = f"it has {size:,} bytes, that one {remote.size:,}"
        elif noted and remote.etag and len(noted) == len(remote.etag):      # of one length: hashes of one kind
            if noted == remote.etag:
                return None
            difference = "it has another hash"
        if difference:
            raise CheckpointError(f"{target}: is not {there}: {difference}. It was left as it is. To get the other, rename "
                                  "or move this one; to use this one, take 'SVDQ Loader'")
        doubt = f"{'its size is right' if remote.size is not None else 'nothing is known of it'}, its content was not " \
                "compared, as this node did not download it, or it was changed, moved or copied since"
    if noted and commit == revision:                    # one commit has one file of that name, whatever repository has it
        return None
    return _uncertain(target, repo_id, revision, doubt)


def _uncertain(target, repo_id, revision, doubt):
    return f"{target} is used, but it is not certain that it is of {repo_id} ({revision}): {doubt}"


def _unasked(error):
    return f"Hugging Face could not be asked ({_said(error)})"


def _note(folder, filename):
    """(commit, hash) as huggingface_hub wrote them beside the file when it fetched it; (None, None) without, or if the file
    was touched later. ctime, too: a file that was moved here keeps its mtime."""
    try:
        commit, etag, written = read_text(Path(folder, ".cache", "huggingface", "download", f"{filename}.metadata")).split()
        stat = os.stat(Path(folder, filename))
        return (commit, etag) if max(stat.st_mtime, stat.st_ctime) - 1 <= float(written) else (None, None)
    except ValueError:          # CheckpointError too: not there, not readable, or not of this form
        return None, None


def _pick(repo_id, revision, wants_fp4):
    """The file of a repository that suits the GPU, by the published naming."""
    from huggingface_hub import HfApi

    # Not list_repo_files, which waits for ever
    siblings = HfApi().model_info(repo_id, revision=revision, timeout=TIMEOUT).siblings or []
    return _chosen(repo_id, [file.rfilename for file in siblings], wants_fp4)


def _chosen(repo_id, names, wants_fp4):
    files = [name for name in names if name.endswith(".safetensors")]
    for prefix in _prefixes(wants_fp4):
        for name in sorted(files, key=lambda name: (name.count("/"), name)):
            if Path(name).name.startswith(prefix):
                return name
    raise CheckpointError(f"{repo_id}: holds no file named svdq-int4_... or svdq-fp4_...; it has "
                          f"{', '.join(map(shown, sorted(files)[:3])) or 'no .safetensors file'}. Set filename, or another "
                          "repo_id")


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
    with folders_in_front(Path(folder, filename)):      # which the library makes before it asks
        return hf_hub_download(repo_id, filename, revision=revision, local_dir=folder, **options)
