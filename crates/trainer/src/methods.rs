//! All methods of this build, from the lists of all points.

use attune_spec::method::MethodDocument;

/// Card, schema and defaults of every method, by name.
pub fn documents() -> Vec<MethodDocument> {
    let mut documents: Vec<MethodDocument> = attune_adapt::ADAPTERS
        .documents()
        .chain(attune_adapt::INITS.documents())
        .chain(attune_adapt::BUDGETS.documents())
        .chain(attune_objective::OBJECTIVES.documents())
        .chain(attune_objective::REWARDS.documents())
        .chain(attune_data::MIXINGS.documents())
        .chain(attune_models::SURGERIES.documents())
        .chain(attune_models::QUANTIZATIONS.documents())
        .chain(crate::STEP_RULES.documents())
        .chain(attune_optim::OPTIMIZERS.documents())
        .chain(attune_optim::SCHEDULES.documents())
        .chain(attune_spec::recipes::RECIPES.documents())
        .chain(attune_search::SEARCHES.documents())
        .chain(attune_merge::MERGES.documents())
        .collect();
    documents.sort_by(|a, b| a.name.cmp(&b.name));
    documents
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::fmt::Write as _;
    use std::path::{Path, PathBuf};

    use attune_spec::method::{Category, ManualDocument, Merges, Point, SiteKind};

    use super::*;

    fn root() -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
    }

    /// The description of every method, with what the head of its file says of it.
    fn described() -> Vec<MethodDocument> {
        let mut manuals = BTreeMap::new();
        let mut folders = vec![root().join("crates")];
        while let Some(folder) = folders.pop() {
            for entry in std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()) {
                if entry.is_dir() {
                    folders.push(entry);
                    continue;
                }
                if entry.extension().is_none_or(|extension| extension != "rs") {
                    continue;
                }
                let text = std::fs::read_to_string(&entry).unwrap();
                let card = text.split_once("impl Method for ").and_then(|(_, code)| code.split_once("Card::new("));
                if let Some(name) = card.and_then(|(_, rest)| rest.split('"').nth(1)) {
                    manuals.insert(name.to_owned(), manual(&text));
                }
            }
        }
        let with = |mut document: MethodDocument| {
            let manual = manuals.remove(&document.name);
            document.manual = manual.unwrap_or_else(|| panic!("{} has no file", document.name));
            document
        };
        documents().into_iter().map(with).collect()
    }

    /// The parts of the head of a method's file.
    fn manual(file: &str) -> ManualDocument {
        let head = file.lines().map_while(|line| line.strip_prefix("//!"));
        let mut parts: BTreeMap<&str, String> = BTreeMap::new();
        let mut part = "";
        for line in head.map(|line| line.strip_prefix(' ').unwrap_or(line)) {
            match line.strip_prefix("# ") {
                Some(title) => part = title,
                None => {
                    let text = parts.entry(part).or_default();
                    text.push_str(line.trim_end());
                    text.push('\n');
                }
            }
        }
        // Links are of the code's own documentation.
        let mut take = |part: &str| parts.remove(part).unwrap_or_default().trim().replace("[`", "`").replace("`]", "`");
        ManualDocument {
            update: take("Update"),
            symbols: take("Symbols"),
            cost: take("Cost"),
            limits: take("Limits"),
            departures: take("Departures"),
        }
    }

    /// What each adapter has and plain LoRA lacks, by the names of the trials that show it.
    fn own_properties() -> BTreeMap<String, String> {
        let folder = root().join("crates/adapt/tests/battery/own");
        let mut found = BTreeMap::new();
        let mut files: Vec<PathBuf> = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
        files.sort();
        for file in files {
            let text = std::fs::read_to_string(file).unwrap();
            let trials = text.lines().filter_map(|line| line.trim_start().strip_prefix("(\"")?.split('"').next());
            for (methods, property) in trials.filter_map(|name| name.split_once("::")) {
                for method in methods.split("_and_") {
                    let property = property.replace('_', " ");
                    let all: &mut String = found.entry(method.replace('_', "-")).or_default();
                    let then = if all.is_empty() { "" } else { "; " };
                    let _ = write!(all, "{then}{property}");
                }
            }
        }
        found
    }

    /// The method of a case that PEFT computed: what its folder is read as; of a mixture of several, and of one whose numbers a network
    /// makes, what the case or its type is called.
    fn of_case(case: &Path, rest: &str) -> String {
        let folder = case.join("adapter");
        if let Ok(read) = attune_adapt::peft::read(&folder) {
            return read.method.method;
        }
        let config = std::fs::read_to_string(folder.join("adapter_config.json")).unwrap_or_default();
        let config: serde_json::Value = serde_json::from_str(&config).unwrap_or_default();
        let kind = config["peft_type"].as_str();
        let named = documents().into_iter().find(|document| kind.is_some() && document.peft_type.as_deref() == kind);
        named.map_or_else(|| rest.split('_').next().unwrap_or_default().to_owned(), |document| document.name)
    }

    /// How many cases of each method PEFT computed on each family: what `crates/adapt/tests/battery/golden.rs` and those beside it
    /// compare with.
    fn parity() -> String {
        let (mut cases, mut families) =
            (BTreeMap::<String, BTreeMap<String, u32>>::new(), BTreeMap::<String, u32>::new());
        let golden = root().join("crates/adapt/golden");
        for case in std::fs::read_dir(golden).unwrap().map(|entry| entry.unwrap().path()).filter(|path| path.is_dir()) {
            let name = case.file_name().unwrap().to_string_lossy().into_owned();
            let Some((family, rest)) = name.split_once('_') else { continue };
            *cases.entry(of_case(&case, rest)).or_default().entry(family.to_owned()).or_default() += 1;
            *families.entry(family.to_owned()).or_default() += 1;
        }
        let mut text = format!(
            "\n## Parity with PEFT\n\n{} cases of {} methods, computed by PEFT on small models of each family from the same folder and the same \
             tokens; outputs, losses, gradients and merged weights agree within 1e-4 in 32 bits, and the folder that is written again is the \
             one that was read (`crates/adapt/golden`, tests `golden::`). Starts and budgets that PEFT has are compared beside these \
             (`golden/starts`, `golden/calibrated`).\n\n| method |",
            families.values().sum::<u32>(),
            cases.len()
        );
        for family in families.keys() {
            let _ = write!(text, " {family} |");
        }
        let _ = writeln!(text, "\n|---|{}", "---:|".repeat(families.len()));
        for (method, counts) in &cases {
            let _ = write!(text, "| `{method}` |");
            for family in families.keys() {
                let count = counts.get(family).map(u32::to_string).unwrap_or_default();
                let _ = write!(text, " {count} |");
            }
            text.push('\n');
        }
        text
    }

    /// What each adapter goes with, by its card; where it does not, why.
    fn capabilities(adapters: &[MethodDocument]) -> String {
        let mut text = String::from(
            "\n## What goes with what\n\nBy category, in the words of the field's surveys (`attune methods list --category NAME`):\n\n\
             | category | methods |\n|---|---|\n",
        );
        for category in Category::ALL {
            let of = adapters.iter().filter(|document| document.category == Some(category));
            let names: Vec<String> = of.map(|document| format!("`{}`", document.name)).collect();
            let _ = writeln!(text, "| {} | {} |", category.as_str(), names.join(", "));
        }
        text.push_str(
            "\nA combination that a cell refuses is refused when the job is submitted, with the reason. What the other cells say is tried: `it starts \
             as the base`, `merged equals unmerged` and the trials of bases in few bits in the battery; budgets in \
             `crates/adapt/tests/battery/budgets.rs`; resumed, on more ranks and in bf16 every adapter ends with the same bytes \
             (`crates/trainer/tests/it/every.rs`).\n\n\
             | method | starts as the base | beside few bits | merges | ranks by a budget | on repeated layers |\n|---|---|---|---|---|---|\n",
        );
        for document in adapters {
            let starts = document.moves.as_ref().map_or_else(|| "yes".to_owned(), |why| format!("no: {why}"));
            let few =
                if document.on_quantized() == Some(true) { "yes" } else { "no: it trains the base's own weights" };
            let merges = match (document.merges, document.stays_beside.as_str()) {
                (Merges::No, _) => "no: it stays beside the base".to_owned(),
                (_, "") => "yes".to_owned(),
                (_, when) => format!("yes, but not where `{}`", when.replace('|', "\\|")),
            };
            let has = |field: &str| document.schema["properties"].get(field).is_some();
            let budget = if has("rank") && has("rank_pattern") { "yes" } else { "no: it has no ranks by site" };
            let repeated = if document.says_repeats() { "yes" } else { "no: its folder has no word for them" };
            let _ = writeln!(text, "| `{}` | {starts} | {few} | {merges} | {budget} | {repeated} |", document.name);
        }
        text
    }

    /// `docs/methods.md`.
    fn page() -> String {
        let own = own_properties();
        let mut page = String::from(
            "# Methods\n\nGenerated from the cards of this build (`ATTUNE_UPDATE=1 cargo nextest run … -E \
             'test(committed_documents_are_current)'`). `attune methods show NAME` has the parameters of each.\n\n\
             ## Adapters\n\nEvery adapter passes the battery in `crates/adapt/tests/battery`: it starts as the base or its card says \
             why not, its gradients agree with central differences in 64 bits, it is read as it was written bit by bit, merged it is \
             what it was beside the base, its formula counts its tensors, and its start depends on seed and site alone. Where PEFT has \
             the method, outputs, gradients, merged weights and files are compared with PEFT's. All but those whose tensors stand in for the base's own \
             work where linears of the base are held in few bits (`tune.quantization`), with the bits that they have on a base of those \
             numbers. The last column is what the method has and LoRA with as many parameters lacks, tested on both. In formulas `i` and `o` are the widths of a linear's input and \
             output (`i` that of a block's rows), `k` that of all keys, `b` 1 with a bias, `down` 1 at linears that lead out of an \
             MLP, `out` 1 at those and at linears out of an attention.\n\n| method | category | paper | sites | base in few bits | parameters a site | shared by its sites | merges | PEFT | its own |\n|---|---|---|---|---|---|---|---|---|---|\n",
        );
        let paper = |document: &MethodDocument| {
            document.paper.as_ref().map_or_else(String::new, |paper| format!("{} ({})", paper.title, paper.year))
        };
        let code = |text: &str| if text.is_empty() { String::new() } else { format!("`{}`", text.replace('|', "\\|")) };
        let sites = |document: &MethodDocument| {
            let names = document.applies.iter().map(|kind| match kind {
                SiteKind::Linear => "linear",
                SiteKind::Embedding => "embedding",
                SiteKind::Norm => "norm",
                SiteKind::Attention => "attention",
                SiteKind::Mlp => "MLP",
            });
            names.collect::<Vec<_>>().join(", ")
        };
        let (adapters, others): (Vec<_>, Vec<_>) =
            documents().into_iter().partition(|document| document.point == Point::Adapter);
        for document in &adapters {
            let merges = match document.merges {
                Merges::No => "no",
                Merges::Factors => "as factors",
                _ => "as a weight",
            };
            let few = if document.on_quantized() == Some(true) { "yes" } else { "no" };
            let _ = writeln!(
                page,
                "| `{}` | {} | {} | {} | {few} | {} | {} | {merges} | {} | {} |",
                document.name,
                document.category.map_or("", Category::as_str),
                paper(document),
                sites(document),
                code(&document.parameters),
                code(&document.shared),
                code(document.peft_type.as_deref().unwrap_or_default()),
                own.get(&document.name).map_or("", String::as_str),
            );
        }
        page.push_str(&capabilities(&adapters));
        page.push_str(&parity());
        page.push_str("\n## Others\n\n| method | point | paper | what it is |\n|---|---|---|---|\n");
        for document in &others {
            let (point, summary) = (document.point.as_str(), &document.summary);
            let _ = writeln!(page, "| `{}` | {point} | {} | {summary} |", document.name, paper(document));
        }
        page
    }

    /// The committed documents are those of the lists. With `ATTUNE_UPDATE=1` in the environment they are written anew.
    #[test]
    fn committed_documents_are_current() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../spec/methods");
        let wanted: BTreeMap<String, String> = described()
            .into_iter()
            .map(|document| {
                (format!("{}.json", document.name), format!("{}\n", serde_json::to_string_pretty(&document).unwrap()))
            })
            .collect();
        let read = || -> BTreeMap<String, String> {
            let entries = std::fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().path());
            let files = entries.filter(|path| path.extension().is_some_and(|extension| extension == "json"));
            files
                .map(|path| {
                    (path.file_name().unwrap().to_string_lossy().into_owned(), std::fs::read_to_string(path).unwrap())
                })
                .collect()
        };
        if std::env::var_os("ATTUNE_UPDATE").is_some() {
            let there = read();
            for name in there.keys().filter(|name| !wanted.contains_key(*name)) {
                std::fs::remove_file(folder.join(name)).unwrap();
            }
            // Whatever is written is built again.
            for (name, text) in wanted.iter().filter(|(name, text)| there.get(*name) != Some(*text)) {
                std::fs::write(folder.join(name), text).unwrap();
            }
        }
        let (file, page) = (root().join("docs/methods.md"), page());
        if std::env::var_os("ATTUNE_UPDATE").is_some() {
            std::fs::write(&file, &page).unwrap();
        }
        let written = std::fs::read_to_string(file).unwrap_or_default();
        assert!(written == page, "docs/methods.md is out of date; run with ATTUNE_UPDATE=1");
        let found = read();
        assert_eq!(found.keys().collect::<Vec<_>>(), wanted.keys().collect::<Vec<_>>(), "run with ATTUNE_UPDATE=1");
        for (name, text) in wanted {
            assert_eq!(found[&name], text, "{name} is out of date; run with ATTUNE_UPDATE=1");
        }
    }

    /// Each adapter but the plain ones shows what is its own.
    #[test]
    fn every_adapter_has_a_property_of_its_own() {
        let own = own_properties();
        let adapters = documents().into_iter().filter(|document| document.point == Point::Adapter);
        let without: Vec<String> =
            adapters.map(|document| document.name).filter(|name| name != "lora" && !own.contains_key(name)).collect();
        assert!(without.is_empty(), "{without:?} have none in crates/adapt/tests/battery/own");
    }

    /// Each adapter says how it tunes a model, and nothing else does.
    #[test]
    fn every_adapter_has_a_category() {
        for document in documents() {
            assert_eq!(document.category.is_some(), document.point == Point::Adapter, "{}", document.name);
            if document.trains_base {
                assert_eq!(document.category, Some(Category::Selective), "{}", document.name);
            }
            if !document.rows_before.is_empty() {
                assert_eq!(document.category, Some(Category::Prompt), "{}", document.name);
            }
        }
    }

    #[test]
    fn names_are_unique_over_all_points_and_well_formed() {
        let mut names: Vec<String> =
            documents().into_iter().flat_map(|document| document.aliases.into_iter().chain([document.name])).collect();
        for name in &names {
            assert!(name.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || "-_".contains(c)), "{name}");
        }
        let all = names.len();
        names.sort();
        names.dedup();
        assert_eq!(names.len(), all);
    }
}
