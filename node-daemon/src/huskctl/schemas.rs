//! JSON Schemas of all that `--output json` prints, generated from the types that are printed. `docs/schema/` has them as files.
//!
//! What they promise is stable: fields may be added, none that is required is removed or changes its meaning.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};
use schemars::generate::SchemaSettings;
use schemars::transform::{RecursiveTransform, Transform as _};
use schemars::{JsonSchema, Schema};

use super::{capture, mtu, support_bundle};
use crate::line_log::LogLine;
use crate::report::{
    CheckListing, DiffReport, DoctorReport, Flow, IpamReport, KeysReport, MtuReport, PeerReport, PodPolicyReport,
    PolicyReport, QuarantineReport, QuarantinedPod, ReleaseReport, RotationReport, Status, Top, TraceReport, UiReport,
    WhatIfReport,
};

/// Makes the schema of a type.
type Make = fn() -> Schema;

/// Name, as for `huskctl schema NAME`, and schema of every report. Commands name theirs in [`super::reference`].
pub(super) const ALL: &[(&str, Make)] = &[
    ("captured", of::<capture::Packet>),
    ("diff", of::<DiffReport>),
    ("doctor", of::<DoctorReport>),
    ("doctor-checks", of::<Vec<CheckListing>>),
    ("encrypted", of::<capture::Verified>),
    ("flow", of::<Flow>),
    ("ipam", of::<IpamReport>),
    ("ipam-check", of::<Vec<String>>),
    ("ipam-release", of::<ReleaseReport>),
    ("keys", of::<KeysReport>),
    ("log", of::<LogLine>),
    ("mtu", of::<Vec<MtuReport>>),
    ("mtu-probe", of::<mtu::Probed>),
    ("mtu-what-if", of::<Vec<WhatIfReport>>),
    ("peers", of::<Vec<PeerReport>>),
    ("pod-policy", of::<PodPolicyReport>),
    ("policy", of::<PolicyReport>),
    ("quarantine", of::<QuarantineReport>),
    ("quarantined", of::<Vec<QuarantinedPod>>),
    ("rotation", of::<RotationReport>),
    ("status", of::<Status>),
    ("support-bundle", of::<support_bundle::Summary>),
    ("top", of::<Top>),
    ("trace", of::<TraceReport>),
    ("ui", of::<UiReport>),
];

/// Which schema.
#[derive(Debug, Clone, clap::Args)]
pub(super) struct Options {
    /// Name of the report; without it, all names are listed
    #[arg(value_parser = clap::builder::PossibleValuesParser::new(ALL.iter().map(|(name, _)| *name)))]
    name: Option<String>,
    /// Write all of them into this directory, NAME.json each
    #[arg(long, value_name = "DIRECTORY", conflicts_with = "name", value_hint = clap::ValueHint::DirPath)]
    write: Option<PathBuf>,
}

/// The text to print.
pub(super) fn run(options: &Options) -> Result<String> {
    if let Some(directory) = &options.write {
        return write(directory);
    }
    let Some(name) = &options.name else {
        return Ok(ALL.iter().fold(String::new(), |text, (name, _)| text + name + "\n"));
    };
    match ALL.iter().find(|(it, _)| it == name) {
        Some((_, schema)) => text(name, *schema),
        None => bail!("there is no report {name}; huskctl schema lists all"),
    }
}

fn write(directory: &Path) -> Result<String> {
    fs::create_dir_all(directory).with_context(|| format!("cannot create {}", directory.display()))?;
    for (name, schema) in ALL {
        let path = directory.join(format!("{name}.json"));
        fs::write(&path, text(name, *schema)?).with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(format!("{} schemas are in {}.\n", ALL.len(), directory.display()))
}

fn text(name: &str, schema: Make) -> Result<String> {
    let mut schema = schema();
    schema.insert("title".into(), format!("huskctl: {name}").into());
    Ok(serde_json::to_string_pretty(&schema)? + "\n")
}

/// The schema of what is printed of a type.
fn of<T: JsonSchema>() -> Schema {
    let generator = SchemaSettings::draft2020_12().for_serialize().into_generator();
    let mut schema = generator.into_root_schema_for::<T>();
    RecursiveTransform(plain).transform(&mut schema);
    schema
}

/// Descriptions come from the comments in the source: without the links of those.
fn plain(schema: &mut Schema) {
    let Some(description) = schema.get("description").and_then(|it| it.as_str()) else { return };
    let description = description.replace("[`", "`").replace("`]", "`");
    schema.insert("description".into(), description.into());
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn the_files_are_those_that_are_generated() {
        let folder = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/schema"));
        for (name, schema) in ALL {
            let path = folder.join(format!("{name}.json"));
            let file = fs::read_to_string(&path).unwrap_or_default();
            let differs = "hack/reference writes it anew; what a script may rely on must not go away";
            // Both texts are long.
            assert!(file == text(name, *schema).unwrap(), "{} is not up to date: {differs}", path.display());
        }
        let files = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
        let expected: BTreeSet<String> = ALL.iter().map(|(name, _)| format!("{name}.json")).collect();
        assert_eq!(files.collect::<BTreeSet<_>>(), expected);
    }

    #[test]
    fn names_are_sorted_and_unlike() {
        assert!(ALL.is_sorted_by(|(one, _), (other, _)| one < other));
    }
}
