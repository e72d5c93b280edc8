//! Modules use only modules below them, in the order of `src/lib.rs`.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

use proc_macro2::{TokenStream, TokenTree};

use crate::documentation;

fn source(file: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("src").join(file)
}

/// The modules of the crate, from the top down.
fn modules() -> Vec<String> {
    let lib = fs::read_to_string(source("lib.rs")).unwrap();
    let modules = lib.lines().filter_map(|line| line.strip_prefix("pub mod "));
    modules
        .map(|name| name.trim_end_matches(';').to_owned())
        .collect()
}

/// The files of a module, and how deep below the crate's root each stands.
fn files(module: &str) -> Vec<(PathBuf, usize)> {
    fn below(folder: &Path, depth: usize, files: &mut Vec<(PathBuf, usize)>) {
        for entry in fs::read_dir(folder).into_iter().flatten() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                below(&path, depth + 1, files);
            } else {
                files.push((path, depth));
            }
        }
    }
    let mut files = vec![(source(&format!("{module}.rs")), 1)];
    below(&source(module), 2, &mut files);
    files
}

fn tokens(file: &Path) -> TokenStream {
    let text = fs::read_to_string(file).unwrap();
    text.parse()
        .unwrap_or_else(|error| panic!("{}: {error}", file.display()))
}

/// What the code names directly below the crate's root, in whatever form: paths, trees of `use`,
/// `super`, the insides of macros. `depth` is that of the module that the tokens are in.
fn named(tokens: TokenStream, depth: usize, names: &mut BTreeSet<String>) {
    let tokens: Vec<_> = tokens.into_iter().collect();
    let mut inner = depth;
    let mut i = 0;
    while i < tokens.len() {
        let is =
            |i: usize, word: &str| tokens.get(i).is_some_and(|token| token.to_string() == word);
        let path_after = |i: usize| is(i + 1, ":") && is(i + 2, ":");
        let mut above = 0;
        while is(i, "super") && path_after(i) {
            above += 1;
            i += 3;
        }
        if above > 0 && above < depth {
            // What follows is a path in a module below the root.
        } else if above > 0 {
            first_segments(&tokens[i..], names);
        } else if is(i, "crate") && path_after(i) {
            i += 3;
            first_segments(&tokens[i..], names);
        } else if is(i, "crate") && is(i + 1, "as") || is(i, "extern") && is(i + 1, "crate") {
            names.insert("another name for the crate".to_owned());
        } else if is(i, "mod") && matches!(tokens.get(i + 2), Some(TokenTree::Group(_))) {
            inner = depth + 1; // for the group, which comes next
        }
        if let Some(TokenTree::Group(group)) = tokens.get(i) {
            named(group.stream(), inner, names);
            inner = depth;
        }
        i += 1;
    }
}

/// `a::b` → `a`; `{a::b, c as d}` → `a`, `c`; `{*}` → `*`.
fn first_segments(path: &[TokenTree], names: &mut BTreeSet<String>) {
    match path.first() {
        Some(TokenTree::Group(group)) => {
            let tree: Vec<_> = group.stream().into_iter().collect();
            for branch in tree.split(|token| token.to_string() == ",") {
                first_segments(branch, names);
            }
        }
        Some(segment) => _ = names.insert(segment.to_string()),
        None => {}
    }
}

fn uses(module: &str) -> BTreeSet<String> {
    let mut names = BTreeSet::new();
    for (file, depth) in files(module) {
        named(tokens(&file), depth, &mut names);
    }
    names.remove(module);
    names
}

#[test]
fn modules_use_only_modules_below_them() {
    let modules = modules();
    assert!(modules.len() > 10);
    let mut wrong = Vec::new();
    for (i, module) in modules.iter().enumerate() {
        let not_below = uses(module)
            .into_iter()
            .filter(|name| !modules[i + 1..].contains(name));
        wrong.extend(not_below.map(|name| format!("{module} uses {name}")));
    }
    assert!(wrong.is_empty(), "not below it in src/lib.rs: {wrong:?}");
}

#[test]
fn no_form_of_a_use_is_overlooked() {
    for code in [
        "use crate::status;",
        "use crate::status::Row;",
        "use crate::{config::Config, status as s};",
        "use crate::{\n    config::{Config, Settings},\n    status,\n};",
        "use super::super::status;",
        "use super::super::{config, status::*};",
        "fn a() -> crate::status::Row { todo!() }",
        "fn a() { info!(x = %crate::status::row()); }",
        "fn a() { use crate::status as s; s::row() }",
        "mod tests { use super::super::super::status; }",
        "mod tests { mod more { fn a() { super::super::super::super::status::row() } } }",
        "macro_rules! a { () => { $crate::status::row() }; }",
    ] {
        let mut names = BTreeSet::new();
        named(code.parse().unwrap(), 2, &mut names);
        assert!(names.contains("status"), "{code}: {names:?}");
    }
    for code in [
        "use crate as c;",
        "extern crate self as c;",
        "use crate::*;",
    ] {
        let mut names = BTreeSet::new();
        named(code.parse().unwrap(), 2, &mut names);
        assert!(!names.is_empty(), "{code}");
    }
    for code in [
        "// crate::status",
        "/// [`crate::status`]\nfn a() -> &str { \"crate::status\" }",
        "use super::status;",
        "mod tests { use super::super::status; }",
        "pub(crate) fn status() {}",
    ] {
        let mut names = BTreeSet::new();
        named(code.parse().unwrap(), 2, &mut names);
        assert!(names.is_empty(), "{code}: {names:?}");
    }
}

#[test]
fn pure_modules_do_no_io() {
    fn words(tokens: TokenStream) -> Vec<String> {
        let words = tokens.into_iter().map(|token| match token {
            TokenTree::Group(group) => words(group.stream()),
            token => vec![token.to_string()],
        });
        words.flatten().collect()
    }
    for module in ["status", "mapping", "failure", "api"] {
        for (file, _) in files(module) {
            // A deadline is a moment of tokio's clock, which tests can pause.
            let words = words(tokens(&file)).join(" ");
            let words = words.replace("tokio : : time : : Instant", "");
            for word in words.split_whitespace() {
                let io = ["async", "fs", "hyper", "net", "reqwest", "tokio"].contains(&word);
                assert!(!io, "{} uses {word}", file.display());
            }
        }
    }
}

#[test]
fn the_table_in_architecture_is_up_to_date() {
    let mut table = "| module | what it is for |\n|---|---|\n".to_owned();
    for module in modules() {
        let text = fs::read_to_string(source(&format!("{module}.rs"))).unwrap();
        let about = text.lines().map_while(|line| line.strip_prefix("//! "));
        let about = about.collect::<Vec<_>>().join(" ").replace(['[', ']'], "");
        let sentence = about
            .split_inclusive(". ")
            .next()
            .unwrap_or_default()
            .trim();
        assert!(
            sentence.ends_with('.'),
            "src/{module}.rs begins with no sentence: {about}"
        );
        table += &format!("| `{module}` | {sentence} |\n");
    }
    documentation::check_section("ARCHITECTURE.md", "modules", &table);
}
