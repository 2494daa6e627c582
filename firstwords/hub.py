"""A model's name on the Hub -> the folder with its files, from the cache or downloaded into it.

    download_files("gpt2", ("tokenizer.json", "vocab.json", "merges.txt"), ...)
    ->  Path("~/.cache/huggingface/hub/models--openai-community--gpt2/snapshots/607a30d...")

Invariant: no file but those asked for is downloaded, and none of them is loaded or run here.
"""

from pathlib import Path

from firstwords.errors import BadFlag, MissingInput

# The names that people know, and where those models live on the Hub today. The cache files a model under the
# name by which it was asked for, so that either may be there.
HUB_MODELS = {
    "gpt2": "openai-community/gpt2",
    "gpt2-medium": "openai-community/gpt2-medium",
    "gpt2-large": "openai-community/gpt2-large",
    "gpt2-xl": "openai-community/gpt2-xl",
    "distilgpt2": "distilbert/distilgpt2",
}


def download_files(repo_id: str, patterns: tuple[str, ...], *, asked_by: str, otherwise: str) -> Path:
    """Return a folder that holds the files of a model.

    Args:
        repo_id: such as `gpt2`, or `owner/name`.
        patterns: names of the files, with wildcards; the first one matters most: a folder of the cache
            that lacks it is passed over for another of the same model.
        asked_by: flag and value, for the errors.
        otherwise: what to do where the model cannot be had.

    Raises:
        BadFlag: when there can be no model of that name.
        MissingInput: when it is neither in the cache nor reachable.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    found, why = [], ""
    for name in dict.fromkeys((HUB_MODELS.get(repo_id, repo_id), repo_id)):
        try:
            found.append(Path(snapshot_download(name, allow_patterns=list(patterns))))
        except HFValidationError:
            raise BadFlag(f"{asked_by}: is no name on the Hub; give hub:owner/name") from None
        except (HfHubHTTPError, OSError) as error:  # not cached and offline are kinds of OSError too
            why = type(error).__name__
        if found and any(found[-1].glob(patterns[0])):
            return found[-1]
    if not found:
        raise MissingInput(f"{asked_by}: neither cached nor reachable on the Hub ({why}); {otherwise}")
    return found[0]
