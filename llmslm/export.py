"""`llmslm export`: a saved system as a folder that is ready for the hub, with a model card."""

import argparse
import json
import shutil
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from transformers import AutoConfig

from llmslm.checkpoint import CARD, ENCODER_TOKENIZER, find_system, load_card, load_parts, save_system, written_aside
from llmslm.errors import UserError
from llmslm.model_card import Part, body, results, scores
from llmslm.models.configuration import LlmToSlmConfig
from llmslm.models.source import PACKAGE, SYSTEM_FOLDER, beside, seen_from
from llmslm.models.trained import frozen_base
from llmslm.provenance import folder_hash

README = "README.md"
_ADAPTERS_CONFIG = "adapter_config.json"


def main(args: list[str]) -> None:
    """Run the command line."""
    options = _parser().parse_args(args)
    output = Path(options.output)
    try:
        folder = export(
            options.checkpoint,
            output,
            records=options.records,
            licenses={"system": options.license, "encoder": options.encoder_license, "base": options.base_license},
            sources={"encoder": options.encoder_source, "base": options.base_source},
            merge=options.merge,
        )
    except OSError as error:
        raise UserError(
            f"{output} cannot be written: {error.strerror or error}; give another folder (--output)"
        ) from error
    sys.stdout.write(f"{folder}\n")


def export(
    checkpoint: str | Path,
    output: Path,
    *,
    records: list[str],
    licenses: dict[str, str | None],
    sources: dict[str, str | None],
    merge: bool = False,
) -> Path:
    """Write a system as a new folder for the hub, whole or not at all.

    Args:
        checkpoint: run or system folder.
        output: the new folder.
        records: evaluation records of this system, files or folders of them; those of other systems are left out.
        licenses: of "system", "encoder" and "base"; None looks into the model card or package of the part, if local.
        sources: where "encoder" and "base" (the frozen weights beside which adapters were trained) lie for those who
            download the folder; None keeps what the system says.
        merge: fold adapters into their base, so that the folder needs no other for it.

    Returns:
        The folder.

    Raises:
        UserError: if there is no such system, the output exists, or no record belongs to the system.
    """
    folder = find_system(checkpoint)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"{output} exists; give a folder that does not (--output)")
    found = find_records(records, folder) if records else []
    card = load_card(folder)
    parts = _parts(folder, card, licenses, sources, merge)
    with written_aside(output) as aside:
        _merge(folder, aside) if merge else shutil.copytree(folder, aside, dirs_exist_ok=True)
        _add_tokenizers(folder, aside)
        _name_sources(aside, aside if merge else folder, sources)
        text = _card(output.name, load_card(aside), parts, found, licenses["system"])
        text.save(aside / README)
    for part in parts:
        if part.is_local and not part.is_merged:
            sys.stderr.write(
                f"llmslm: the folder names a local {part.role}, {part.source}, which others do not have; give its "
                f"place on the hub with --{part.role}-source\n"
            )
    return output


def find_records(places: list[str], folder: Path) -> list[dict[str, Any]]:
    """Read the evaluation records of a system among files and folders of records.

    Raises:
        UserError: if a file is no record, or none is of this system.
    """
    paths = [p for place in places for p in (sorted(Path(place).rglob("*.record.json")) or [Path(place)])]
    read = [_read_record(path) for path in paths]
    system, content = load_card(folder)["system"], folder_hash(folder)
    found = [one for one in read if one["system"] == system and one["hashes"]["checkpoint"] == content]
    if not found:
        raise UserError(
            f"none of the {len(read)} records in {', '.join(places)} is of the system in {folder} (content "
            f"{content[:12]}); evaluate it with llmslm-eval compare and give that folder (--records)"
        )
    return found


def _read_record(path: Path) -> dict[str, Any]:
    try:
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        record["hashes"]["checkpoint"], record["system"], list(results(record)), scores(record)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"{path} is not an evaluation record; expected a *.record.json file of llmslm-eval, or a folder of them "
            "(--records)"
        ) from error
    return record


def _merge(folder: Path, aside: Path) -> None:
    """Save with whole weights; the frozen encoder stays out as always."""
    model, codec, card = load_parts(folder, load_encoder=False)
    card.pop("frozen_base", None)
    save_system(aside, model, codec, card)


def _add_tokenizers(folder: Path, aside: Path) -> None:
    """Write those tokenizers too that a run folder leaves to the sources of its frozen models."""
    named = load_card(folder).get("named_tokenizers") or {}
    if not named:
        return
    _, codec, _ = load_parts(folder, load_encoder=False)
    if "slm" in named:
        codec.slm_tokenizer.save_pretrained(aside)
    if "encoder" in named and codec.encoder_tokenizer is not None:
        codec.encoder_tokenizer.save_pretrained(aside / ENCODER_TOKENIZER)
    _write_json(aside / CARD, load_card(aside) | {"named_tokenizers": {}})


def _name_sources(aside: Path, origin: Path, sources: dict[str, str | None]) -> None:
    """Name encoder and base as those find them who read the new folder; now they are named relative to `origin`."""
    config = _composition(aside)
    if config is not None:
        config.resolve(origin)
        config = config.seen_from(aside)
        if sources["encoder"]:
            config.encoder_source, config.encoder_revision = sources["encoder"], None
        if (base := frozen_base(config.slm_config)) is not None and sources["base"]:
            config.slm_config.frozen_base = base | {"source": sources["base"], "revision": None}
        config.save_pretrained(aside)
    card = load_card(aside)
    if (base := card.get("frozen_base")) is not None:
        source = sources["base"] or seen_from(beside(base["source"], origin), aside)
        card["frozen_base"] = base | {"source": source} | ({"revision": None} if sources["base"] else {})
        _write_json(aside / CARD, card)
        adapters = json.loads((aside / _ADAPTERS_CONFIG).read_text(encoding="utf-8"))
        _write_json(aside / _ADAPTERS_CONFIG, adapters | {"base_model_name_or_path": source})


def _composition(folder: Path) -> LlmToSlmConfig | None:
    config = AutoConfig.from_pretrained(folder) if (folder / "config.json").is_file() else None
    return config if isinstance(config, LlmToSlmConfig) else None


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _parts(
    folder: Path,
    card: dict[str, Any],
    licenses: dict[str, str | None],
    sources: dict[str, str | None],
    merge: bool,
) -> list[Part]:
    """Describe the models that a system needs or was made from."""
    config = _composition(folder)
    base = card.get("frozen_base") if config is None else frozen_base(config.slm_config)
    named = [] if config is None else [("encoder", config.encoder_source, config.encoder_hash)]
    if base is not None:
        named.append(("base", base["source"], base["hash"]))
    parts = []
    for role, source, content in named:
        found = beside(source or "", folder)
        given = sources[role]
        name = given or (_name(Path(found).resolve()) if Path(found).exists() else found)
        license_ = licenses[role] or known_license(found)
        parts.append(
            Part(role, name, content, license_, given is None and Path(found).exists(), role == "base" and merge)
        )
    return parts


def _name(place: Path) -> str:
    """Name a local model without the machine's paths: a run's system by its recipe and system."""
    return "/".join(place.parts[-3:-1]) if place.name == SYSTEM_FOLDER else place.name


def known_license(source: str) -> str | None:
    """Return the licence that a part states itself on this machine; None where it states none.

    Read are the model card of a folder or of the hub's cache, and the metadata of an installed package.
    """
    if source.startswith(PACKAGE):
        return _license_of_package(source.removeprefix(PACKAGE))
    place = Path(source)
    card: Any = (place.parent if place.is_file() else place) / README
    if not place.exists():
        try:
            card = try_to_load_from_cache(source, README)
        except HFValidationError:
            return None
    if not isinstance(card, str | Path) or not Path(card).is_file():
        return None
    stated = ModelCard.load(card).data.license
    return ", ".join(stated) if isinstance(stated, list) else stated


def _license_of_package(name: str) -> str | None:
    try:
        about: dict[str, Any] = metadata.metadata(name.replace("_", "-")).json
    except metadata.PackageNotFoundError:
        return None
    stated = about.get("license_expression") or about.get("license") or ""
    return stated if stated and "\n" not in stated else None  # some hold the whole text


def _card(
    name: str, card: dict[str, Any], parts: list[Part], records: list[dict[str, Any]], license_: str | None
) -> ModelCard:
    data = ModelCardData(
        model_name=name,
        license=license_,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["llm-to-slm", card["system"]],
        base_model=[part.source for part in parts if part.is_on_hub] or None,
        eval_results=[EvalResult(**result) for record in records for result in results(record)] or None,
    )
    return ModelCard(
        f"---\n{data.to_yaml()}\n---\n\n{body(name, card, parts, records, license_)}", ignore_metadata_errors=False
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="llmslm export",
        allow_abbrev=False,
        description="Write a system as a folder for the hub, with a model card.",
    )
    parser.add_argument("--checkpoint", required=True, help="run folder or system folder")
    parser.add_argument("--output", required=True, help="a new folder")
    parser.add_argument(
        "--records", nargs="+", default=[], metavar="PATH", help="evaluation records of the system, files or folders"
    )
    parser.add_argument("--license", help="of the exported weights, as the hub names it, for example apache-2.0")
    parser.add_argument("--encoder-license", help="of the encoder; default: what its model card or package says")
    parser.add_argument("--base-license", help="of the frozen base of adapters; default: as for the encoder")
    parser.add_argument("--encoder-source", help="where the encoder lies for others, for example its name on the hub")
    parser.add_argument("--base-source", help="where the frozen base of adapters lies for others")
    parser.add_argument("--merge", action="store_true", help="fold adapters into their base: no base is needed")
    return parser
