"""What a run writes into its folder before its first step: with it the folder explains itself."""

import hashlib
import os
from pathlib import Path

from llmtrain.checkpoint.origin import read_origin
from llmtrain.config.reading.rendering import record_of
from llmtrain.config.schema import DataConfig
from llmtrain.data.storage.folders import run_settings
from llmtrain.data.storage.manifest import LONGEST_TOKENIZER, Manifest
from llmtrain.data.token_roles import SETTINGS_NAME, TrainedTokens, read_settings, settings_text, settings_tokenizer
from llmtrain.errors import DataError
from llmtrain.files import read_bytes, replace_file, sealed_text
from llmtrain.observe.environment import save_environment
from llmtrain.preflight.resolve import ResolvedRun
from llmtrain.preflight.source_use import source_uses
from llmtrain.runs.attempts import StartedAttempt, begin_attempt
from llmtrain.runs.folder import RunFolder
from llmtrain.train.start import Start
from llmtrain.values.tokenizer import TokenRoles


def record_start(resolved: ResolvedRun, folder: RunFolder, start: Start) -> StartedAttempt:
    """Write the files of a run, and that an attempt begins. Raises RunFolderInUseError where the folder is not held."""
    folder.ensure_held()
    save_run_files(resolved, folder.path, start.checkpoint.path if start.checkpoint else None)
    data = [source.to_json() for source in source_uses(resolved)]
    return begin_attempt(folder.path, start.step, resolved.config.launch.num_workers, data)


def save_run_files(resolved: ResolvedRun, path: Path, checkpoint: Path | None = None) -> None:
    """The resolved configuration, the environment and the tokenizer: with them the folder explains itself.

    `checkpoint` is the one that the run continues. What is known of the tokenizer beside its file comes from the data,
    else from there.
    """
    config, manifest, tokenizer = resolved.config, resolved.train[0], resolved.tokenizer
    content = read_bytes(tokenizer, LONGEST_TOKENIZER)
    if hashlib.sha256(content).hexdigest() != manifest.tokenizer_sha256:
        raise DataError(f"{tokenizer}: was changed while it was read. See who writes there, then start again.")
    roles = trained_roles(config.data, manifest, checkpoint)
    if roles is None and tokenizer.suffix == ".json":
        roles = TokenRoles().as_trained(manifest.eos_id, manifest.bos_ids)
    # Nothing is written before all that it is made of was found whole: what the folder has stays good.
    replace_file(path / "config.yaml", sealed_text(record_of(config)).encode())
    save_environment(path)
    replace_file(path / f"tokenizer{tokenizer.suffix}", content)
    if roles is None:
        (path / SETTINGS_NAME).unlink(missing_ok=True)
    else:
        replace_file(path / SETTINGS_NAME, settings_text(roles, manifest.tokenizer_sha256).encode())


def trained_roles(data: DataConfig, manifest: Manifest, checkpoint: Path | None) -> TokenRoles | None:
    """What is known of a run's tokenizer, with the end and begin that its documents have; None where nothing is.

    Raises DataError where a file that says it is damaged.
    """
    settings, sha256 = run_settings(data, manifest), manifest.tokenizer_sha256
    roles = read_settings(settings, sha256, manifest.vocab_size) if settings else None
    if checkpoint is not None:
        before = checkpoint.absolute().parent.parent / SETTINGS_NAME
        if os.path.lexists(before):
            found = read_settings(before, None, manifest.vocab_size)
            if settings_tokenizer(before) == sha256 or sha256 in found.equal_sha256:
                roles = roles.with_model_of(found) if roles else found
        elif TrainedTokens.of(read_origin(checkpoint).about).has_settings:
            raise DataError(f"{before}: missing, and there was one. Copy it there again: it says what the model needs.")
    return None if roles is None else roles.as_trained(manifest.eos_id, manifest.bos_ids)
