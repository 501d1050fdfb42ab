//! The map: this node and the others, as a picture without any script.
//!
//! Few are drawn around this node, with their names and round-trip times; many are a field of cells, each the colour of its
//! health, in which trouble shows at a glance. Cells of one colour are one path, so that 5,000 nodes are a picture of tens of
//! kilobytes.

use std::f64::consts::TAU;
use std::fmt::Write as _;

use maud::{Markup, html};

use super::view::{Health, PeerView, View};

/// Most peers that are drawn around this node.
const DRAWN: usize = 12;

/// Most cells that say whose they are.
const NAMED: usize = 400;

/// Width and height of the drawing of few, in its own units.
const WIDTH: f64 = 720.0;
const HEIGHT: f64 = 330.0;

/// Pitch and size of cells.
const PITCH: usize = 8;
const CELL: usize = 7;

/// Letters of a name that have room beside a node.
const NAME: usize = 15;

pub(super) fn map(view: &View) -> Markup {
    // What a search leaves out is still there: the few are drawn from all rows only when all are in them.
    if view.all <= DRAWN && view.found == view.all { few(view) } else { many(view) }
}

fn few(view: &View) -> Markup {
    let mut peers: Vec<&PeerView> = view.peers.iter().collect();
    peers.sort_by(|one, other| one.node.cmp(&other.node));
    let count = u32::try_from(peers.len().max(1)).map_or(1.0, f64::from);
    // The picture is wider than high, so that one or two lie beside this node; of more none lies straight below it, where its
    // name is.
    let first = if count > 2.0 { TAU / 4.0 + TAU / 2.0 / count } else { 0.0 };
    let places = (0..).map(|number: u32| {
        let angle = first + TAU * f64::from(number) / count;
        (WIDTH / 2.0 + angle.cos() * WIDTH * 0.33, HEIGHT / 2.0 + angle.sin() * HEIGHT * 0.32)
    });
    let placed: Vec<(&PeerView, (f64, f64))> = peers.into_iter().zip(places).collect();
    let (x0, y0) = (WIDTH / 2.0, HEIGHT / 2.0);
    html! {
        svg class="map" viewBox={ "0 0 " (WIDTH) " " (HEIGHT) } role="img" aria-label=(label(view)) {
            @for (peer, (x, y)) in &placed {
                line class=(peer.health.class()) x1=(x0) y1=(y0) x2=(at(*x)) y2=(at(*y)) {}
            }
            @for (peer, (x, y)) in &placed {
                g class=(peer.health.class()) {
                    title { (peer.node) ": " (peer.state) @if let Some(reason) = &peer.reason { ", " (reason) } }
                    circle cx=(at(*x)) cy=(at(*y)) r="9" {}
                    text x=(at(*x)) y=(at(if *y < y0 { y - 36.0 } else { y + 28.0 })) { (short(peer.node.as_str())) }
                    text class="detail" x=(at(*x)) y=(at(if *y < y0 { y - 16.0 } else { y + 48.0 })) { (detail(peer)) }
                }
            }
            g class="own" {
                title { (view.node) ", this node" }
                circle cx=(x0) cy=(y0) r="13" {}
                text x=(x0) y=(y0 + 32.0) { (short(view.node.as_str())) }
            }
        }
    }
}

fn many(view: &View) -> Markup {
    let count = view.cells.len();
    // Twice as wide as high, and of a size that a finger can hit, as long as there is room.
    let columns = (count * 2).isqrt().clamp(12, 100);
    let rows = count.div_ceil(columns).max(1);
    let scale = if count <= NAMED { 3 } else { 1 };
    html! {
        svg class="map field" width=(columns * PITCH * scale) viewBox={ "0 0 " (columns * PITCH) " " (rows * PITCH) } role="img" aria-label=(label(view)) {
            @if count <= NAMED {
                @for (number, (node, health)) in view.cells.iter().enumerate() {
                    rect class=(health.class()) x=(number % columns * PITCH) y=(number / columns * PITCH) width=(CELL) height=(CELL) {
                        title { (node) ": " (health.word()) }
                    }
                }
            } @else {
                @for health in Health::ALL {
                    path class=(health.class()) d=(cells(view, health, columns)) {}
                }
            }
        }
    }
}

fn cells(view: &View, health: Health, columns: usize) -> String {
    let mut path = String::new();
    for (number, _) in view.cells.iter().enumerate().filter(|(_, (_, cell))| *cell == health) {
        let (x, y) = (number % columns * PITCH, number / columns * PITCH);
        // Writing to a text does not fail.
        let _ = write!(path, "M{x} {y}h{CELL}v{CELL}h-{CELL}z");
    }
    path
}

/// What somebody hears who does not see the picture.
fn label(view: &View) -> String {
    let counts: Vec<String> = view.counts.iter().map(|(health, count)| format!("{count} {}", health.word())).collect();
    format!("{} other nodes: {}", view.all, counts.join(", "))
}

fn at(coordinate: f64) -> f64 {
    (coordinate * 10.0).round() / 10.0
}

fn short(name: &str) -> String {
    if name.chars().count() <= NAME {
        return name.to_owned();
    }
    name.chars().take(NAME - 1).chain(['…']).collect()
}

fn detail(peer: &PeerView) -> String {
    match (peer.health, peer.rtt_ms) {
        (Health::Broken | Health::Troubled, _) | (_, None) => peer.state.to_owned(),
        (_, Some(rtt)) => format!("{rtt:.1} ms"),
    }
}
