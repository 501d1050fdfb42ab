//! Versions of the CNI specification.

use serde_json::{Value, json};

use crate::error::{Code, Failure};

/// A version this plugin is tested with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Version {
    /// 0.3.1
    V0_3_1,
    /// 0.4.0 brought CHECK.
    V0_4_0,
    /// 1.0.0 dropped the `version` of an address.
    V1_0_0,
    /// 1.1.0 brought STATUS, GC and the MTU of an interface.
    V1_1_0,
}

impl Version {
    /// All of them, oldest first.
    pub(crate) const ALL: [Self; 4] = [Self::V0_3_1, Self::V0_4_0, Self::V1_0_0, Self::V1_1_0];

    /// The newest.
    pub(crate) const NEWEST: Self = Self::V1_1_0;

    /// As a configuration writes it.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::V0_3_1 => "0.3.1",
            Self::V0_4_0 => "0.4.0",
            Self::V1_0_0 => "1.0.0",
            Self::V1_1_0 => "1.1.0",
        }
    }

    /// The version of that text. A text that is no version at all could not be decoded; an empty one, or none, means 0.1.0
    /// (libcni), which is a version we do not know.
    pub(crate) fn parse(text: &str) -> Result<Self, Failure> {
        Self::ALL.into_iter().find(|version| version.as_str() == text).ok_or_else(|| {
            let known = Self::ALL.map(Self::as_str).join(", ");
            let code = if text.is_empty() || is_semantic(text) { Code::IncompatibleVersion } else { Code::Decode };
            Failure::new(code, format!("the network configuration has cniVersion {text:?}; this plugin knows {known}"))
        })
    }

    /// Refuses a command that the configuration's version does not have.
    pub(crate) fn require(self, since: Self, command: &str) -> Result<(), Failure> {
        if self >= since {
            return Ok(());
        }
        let (own, since) = (self.as_str(), since.as_str());
        Err(Failure::new(
            Code::IncompatibleVersion,
            format!("{command} exists since cniVersion {since}, but the network configuration has {own}"),
        ))
    }
}

/// True for three numbers with dots between them, whatever follows after `-` or `+` (Semantic Versioning 2.0).
fn is_semantic(text: &str) -> bool {
    let core = text.split(['-', '+']).next().unwrap_or_default();
    let is_number = |part: &str| !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_digit());
    core.split('.').count() == 3 && core.split('.').all(is_number)
}

/// The answer to VERSION.
pub(crate) fn answer(stdin: &[u8]) -> Value {
    let given = serde_json::from_slice::<Value>(stdin).ok();
    let given = given.as_ref().and_then(|config| config.get("cniVersion")).and_then(Value::as_str);
    json!({
        "cniVersion": given.unwrap_or(Version::NEWEST.as_str()),
        "supportedVersions": Version::ALL.map(Version::as_str),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_answer_echoes_the_version_asked_with() {
        let answer = answer(br#"{"cniVersion": "9.9.9"}"#);
        assert_eq!(answer["cniVersion"], "9.9.9");
        assert_eq!(answer["supportedVersions"], json!(["0.3.1", "0.4.0", "1.0.0", "1.1.0"]));
        assert_eq!(super::answer(b"")["cniVersion"], "1.1.0");
    }

    #[test]
    fn a_version_nobody_wrote_is_told_from_one_we_do_not_know() {
        for (text, code) in [
            ("1.2.0", Code::IncompatibleVersion),
            ("0.3.0-rc.1", Code::IncompatibleVersion),
            ("", Code::IncompatibleVersion),
            ("1.1", Code::Decode),
            ("newest", Code::Decode),
            ("1..0", Code::Decode),
        ] {
            assert_eq!(Version::parse(text).unwrap_err().code, code, "{text}");
        }
    }

    #[test]
    fn commands_have_their_versions() {
        assert!(Version::V0_3_1.require(Version::V0_4_0, "CHECK").unwrap_err().message.contains("0.4.0"));
        assert!(Version::V1_1_0.require(Version::V1_1_0, "GC").is_ok());
    }
}
