//! `huskctl keys status`

use super::{age, bytes, list, or_dash, table};
use crate::keys::Technology;
use crate::report::{Direction, KeysReport, RotationDue};

pub(in crate::huskctl) fn keys(keys: &KeysReport, verbose: bool) -> String {
    let what = match keys.technology {
        Technology::Wireguard => "WireGuard".to_owned(),
        Technology::Esp => format!("IPsec ({})", or_dash(keys.cipher)),
    };
    let mut text = format!("Mode {}, {what}. {}\n", keys.mode, outlook(keys));
    let number = match keys.technology {
        Technology::Wireguard => "GENERATION",
        Technology::Esp => "EPOCH",
    };
    let mut epochs = table(&[number, "AGE", "PUBLISHED", "CONFIRMED BY", "WAITING FOR", "PUBLIC KEY"]);
    for row in &keys.epochs {
        epochs.add_row(vec![
            row.epoch.to_string(),
            age(row.age),
            if row.published { "yes" } else { "no" }.to_owned(),
            list(&row.confirmed),
            list(&row.unconfirmed),
            row.public_key.to_string(),
        ]);
    }
    let mut peers = table(&["PEER", "ITS EPOCHS", "SENDING OWN", "SENDING ITS", "CONFIRMED", "REASON"]);
    for row in &keys.peers {
        peers.add_row(vec![
            row.node.to_string(),
            list(&row.published),
            or_dash(row.sending_own),
            or_dash(row.sending_peer),
            or_dash(row.confirmed),
            row.refused.clone().unwrap_or_default(),
        ]);
    }
    text += &format!("\n{}\n\n{}\n", epochs.trim_fmt(), peers.trim_fmt());
    if verbose && keys.technology == Technology::Esp {
        text += &associations(keys);
    }
    text
}

/// What comes next.
fn outlook(keys: &KeysReport) -> String {
    // What a key may protect is limited for ESP only: WireGuard's sessions have keys of their own.
    let (or_full, or_soon) = match keys.technology {
        Technology::Esp => {
            (", or once one has protected as much as it may", ", or once it has protected as much as it may")
        }
        Technology::Wireguard => (" only", ""),
    };
    let due = match (keys.due, keys.epochs.is_empty()) {
        (_, true) => "No key has been made yet.".to_owned(),
        (None, false) => format!("Keys are replaced on demand{or_full}."),
        (Some(RotationDue { latest: 0, .. }), false) => "The newest key is due to be replaced.".to_owned(),
        (Some(RotationDue { earliest: 0, latest }), false) => {
            format!("The newest key will be replaced within {}{or_soon}.", age(latest))
        }
        (Some(RotationDue { earliest, latest }), false) => {
            format!("The newest key will be replaced in {} to {}{or_soon}.", age(earliest), age(latest))
        }
    };
    match (&keys.waiting, keys.requested, keys.settled) {
        (Some(reason), _, _) => format!("{due} A rotation has to wait: {reason}."),
        (None, true, _) => format!("{due} A rotation was asked for."),
        (None, false, false) if !keys.epochs.is_empty() => format!("{due} A rotation is under way."),
        _ => due,
    }
}

fn associations(keys: &KeysReport) -> String {
    let header = ["PEER", "", "SPI", "FROM", "TO", "OWN EPOCH", "ITS EPOCH", "PACKETS", "BYTES", "QUIET"];
    let mut rows = table(&header);
    for row in &keys.associations {
        rows.add_row(vec![
            row.peer.as_ref().map_or_else(|| "(no use for it)".into(), ToString::to_string),
            match row.direction {
                Direction::In => "in",
                Direction::Out => "out",
            }
            .to_owned(),
            format!("{:#010x}", row.spi),
            row.source.to_string(),
            row.destination.to_string(),
            or_dash(row.own_epoch),
            or_dash(row.peer_epoch),
            row.packets.to_string(),
            bytes(row.bytes),
            age(row.quiet),
        ]);
    }
    format!("\n{}\n", rows.trim_fmt())
}
