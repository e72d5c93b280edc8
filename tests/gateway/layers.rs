//! The rooms use only what ARCHITECTURE.md lets them use.

use std::{fs, path::Path};

fn sources(room: &str) -> String {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut text = fs::read_to_string(src.join(format!("{room}.rs"))).unwrap();
    if let Ok(files) = fs::read_dir(src.join(room)) {
        for file in files {
            text.push_str(&fs::read_to_string(file.unwrap().path()).unwrap());
        }
    }
    let code = text
        .lines()
        .filter(|line| !line.trim_start().starts_with("//"));
    code.map(|line| format!("{line}\n")).collect()
}

/// From the top down; a room uses rooms that stand further right.
const ROOMS: &[&str] = &[
    "cli",
    "simulator",
    "server",
    "config",
    "service",
    "create",
    "flights",
    "upstream",
    "recent",
    "telemetry",
    "status",
    "attempts",
    "certificates",
    "mapping",
    "deadline",
    "early_headers",
    "quote",
    "credentials",
    "proxies",
    "outcome",
];

#[test]
fn dependencies_point_downwards() {
    for (i, room) in ROOMS.iter().enumerate() {
        let text = sources(room);
        for above in &ROOMS[..i] {
            let path = format!("crate::{above}");
            let grouped = format!("\n    {above}::");
            let uses = text.contains(&path) || text.contains(&grouped);
            assert!(!uses, "{room} uses {above}");
        }
    }
}

#[test]
fn only_the_command_line_knows_the_simulator() {
    for room in &ROOMS[2..] {
        assert!(!sources(room).contains("simulator"), "{room}");
    }
}

#[test]
fn the_pure_rooms_do_no_io() {
    for room in ["mapping", "outcome", "status"] {
        let text = sources(room);
        for io in ["tokio", "reqwest", "hyper", "std::fs", "std::net", "async "] {
            assert!(!text.contains(io), "{room} has {io}");
        }
    }
}
