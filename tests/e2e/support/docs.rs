//! Pages of `docs/` whose code blocks are files: ```` ```toml ecosystem.toml ````.

use std::collections::BTreeMap;
use std::path::Path;

/// A file's name and text.
pub(crate) type Files = BTreeMap<String, String>;

/// The files under each heading of a page that has some. Headings are without their `#`.
pub(crate) fn examples(page: &str) -> BTreeMap<String, Files> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs").join(page);
    let text = std::fs::read_to_string(&path)
        .unwrap_or_else(|error| panic!("cannot read {}: {error}", path.display()));
    let mut found: BTreeMap<String, Files> = BTreeMap::new();
    let mut heading = String::new();
    let mut block: Option<(String, String)> = None;
    for line in text.lines() {
        match (&mut block, line.strip_prefix("```")) {
            (None, None) => {
                if let Some(title) = line.strip_prefix('#') {
                    heading = title.trim_start_matches('#').trim().to_owned();
                }
            }
            // Blocks without a name are for reading.
            (None, Some(info)) => {
                let name = info.split_once(' ').map_or("", |(_, name)| name.trim());
                block = Some((name.to_owned(), String::new()));
            }
            (Some((_, text)), None) => {
                text.push_str(line);
                text.push('\n');
            }
            (Some((name, text)), Some(_)) => {
                if !name.is_empty() {
                    let (name, text) = (std::mem::take(name), std::mem::take(text));
                    let twice = found.entry(heading.clone()).or_default().insert(name.clone(), text);
                    assert!(twice.is_none(), "{page}: {name} is twice under {heading:?}");
                }
                block = None;
            }
        }
    }
    assert!(block.is_none(), "{page} ends within a code block");
    found
}
