//! Who may see the page.

use std::fmt;
use std::io;
use std::net::IpAddr;
use std::path::Path;
use std::sync::Arc;

use husk_overlay::digest;
use husk_overlay::name::NodeName;
use hyper::header::{COOKIE, HOST, HeaderValue};
use hyper::http::request::Parts;

use crate::files;

/// File below the run directory that holds the key, so that a restart of the daemon does not show anybody out.
const KEY_FILE: &str = "ui.key";

/// Bytes of randomness in a key.
const STRENGTH: usize = 16;

/// What the page asks for: known to root of this host, since the last boot.
#[derive(Clone, PartialEq, Eq)]
pub struct Key(String);

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Key")
    }
}

impl Key {
    /// The key of this boot; made where there is none.
    ///
    /// # Errors
    /// When the file cannot be read or written.
    pub fn of(run_directory: &Path) -> io::Result<Self> {
        let file = run_directory.join(KEY_FILE);
        let kept = files::read_text(&file, 1024).map_err(io::Error::other)?;
        if let Some(kept) = kept.map(Self).filter(Self::is_well_formed) {
            return Ok(kept);
        }
        let mut bytes = [0; STRENGTH];
        getrandom::fill(&mut bytes).map_err(io::Error::other)?;
        let key = Self(bytes.iter().map(|byte| format!("{byte:02x}")).collect());
        files::replace(&file, key.0.as_bytes(), 0o600)?;
        Ok(key)
    }

    fn is_well_formed(&self) -> bool {
        self.0.len() == STRENGTH * 2 && self.0.bytes().all(|byte| byte.is_ascii_hexdigit())
    }

    /// The key as it stands in the address that `huskctl ui` prints, and nowhere else.
    #[must_use]
    pub fn expose(&self) -> &str {
        &self.0
    }

    /// What a browser keeps in place of the key, which cannot be had from it. A browser sends cookies to every port of a host
    /// (RFC 6265, section 8.5), so that another server there gets to see it.
    pub(super) fn cookie(&self) -> String {
        digest::hex(&["cookie of the page", &self.0])
    }
}

/// Whether both are the same, in a time that says nothing about how much of it is.
fn same(own: &str, given: &str) -> bool {
    let (own, given) = (own.as_bytes(), given.as_bytes());
    own.len() == given.len() && own.iter().zip(given).fold(0, |differ, (own, given)| differ | (own ^ given)) == 0
}

/// Judges requests.
#[derive(Debug)]
pub(super) struct Access {
    key: Arc<Key>,
    /// Browsers keep one cookie jar for all ports of a host: nodes that were forwarded to the same one have their own each.
    cookie: String,
    /// What it says.
    value: Secret,
}

/// Lets whoever has it see the page.
struct Secret(String);

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret")
    }
}

/// Who asks.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Visit {
    /// Somebody who was led here by a name that is none of ours.
    Foreign,
    /// Somebody without the key.
    Unknown,
    /// Somebody who brings the key in the address: gets a cookie for it, which stays out of histories.
    WithKey(HeaderValue),
    /// Somebody who may see everything.
    Known,
}

impl Access {
    pub(super) fn new(key: Arc<Key>, node: &NodeName) -> Self {
        Self { value: Secret(key.cookie()), key, cookie: format!("husk-{node}") }
    }

    pub(super) fn judge(&self, request: &Parts) -> Visit {
        let host = request.headers.get(HOST).and_then(|host| host.to_str().ok()).unwrap_or_default();
        if !is_own_name(host) {
            return Visit::Foreign;
        }
        let cookies = request.headers.get_all(COOKIE).iter().filter_map(|cookies| cookies.to_str().ok());
        let mut cookies =
            cookies.flat_map(|cookies| cookies.split(';')).filter_map(|cookie| cookie.trim().split_once('='));
        if cookies.any(|(name, value)| name == self.cookie && same(&self.value.0, value)) {
            return Visit::Known;
        }
        let given = request.uri.query().and_then(|query| query.strip_prefix("key="));
        let with_key = request.uri.path() == "/" && given.is_some_and(|given| same(self.key.expose(), given));
        let cookie = format!("{}={}; Path=/; HttpOnly; SameSite=Strict", self.cookie, self.value.0);
        match HeaderValue::from_str(&cookie) {
            Ok(cookie) if with_key => Visit::WithKey(cookie),
            _ => Visit::Unknown,
        }
    }
}

/// True for loopback's addresses and `localhost`, at any port: who forwards the page may have chosen another.
fn is_own_name(host: &str) -> bool {
    let name = match host.rsplit_once(':') {
        Some((name, port)) if !port.is_empty() && port.bytes().all(|byte| byte.is_ascii_digit()) => name,
        _ => host,
    };
    let address = name.strip_prefix('[').and_then(|name| name.strip_suffix(']')).unwrap_or(name);
    name.eq_ignore_ascii_case("localhost") || address.parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
}

#[cfg(test)]
mod tests {
    use hyper::Request;

    use super::*;

    const KEY: &str = "0123456789abcdef0123456789abcdef";

    fn access() -> Access {
        Access::new(Arc::new(Key(KEY.into())), &NodeName::new("host1").unwrap())
    }

    fn judged(host: &str, uri: &str, cookie: &str) -> Visit {
        let request = Request::get(uri).header(HOST, host).header(COOKIE, cookie).body(()).unwrap();
        access().judge(&request.into_parts().0)
    }

    #[test]
    fn only_who_has_the_key_is_let_in_and_only_by_our_names() {
        let value = Key(KEY.into()).cookie();
        let cookie = format!("other=1; husk-host1={value}");
        for host in ["localhost", "localhost:1", "LocalHost:9473", "127.0.0.1:9473", "127.9.9.9", "[::1]:8080", "[::1]"]
        {
            assert_eq!(judged(host, "/api/state", &cookie), Visit::Known, "{host}");
        }
        for host in [
            "",
            "evil.example",
            "evil.example:9473",
            "127.0.0.1.evil.example",
            "localhost.evil",
            "192.0.2.1",
            "[::2]:1",
        ] {
            assert_eq!(judged(host, "/", &cookie), Visit::Foreign, "{host}");
        }
        for cookie in [
            "",
            "husk-host1=",
            &format!("husk-host1={}", "0".repeat(value.len())),
            &format!("husk-host2={value}"),
            // The key opens addresses, and is no cookie.
            &format!("husk-host1={KEY}"),
        ] {
            assert_eq!(judged("localhost", "/", cookie), Visit::Unknown, "{cookie}");
        }
        let Visit::WithKey(set) = judged("localhost", "/?key=0123456789abcdef0123456789abcdef", "") else {
            panic!("the key is not taken");
        };
        let set = set.to_str().unwrap();
        assert!(set.starts_with(&format!("husk-host1={value};")) && !set.contains(KEY), "{set}");
        assert!(set.contains("HttpOnly") && set.contains("SameSite=Strict"), "{set}");
        assert_eq!(judged("localhost", &format!("/?key={value}"), ""), Visit::Unknown, "a cookie opens no address");
        for uri in ["/?key=0123", "/api/state?key=0123456789abcdef0123456789abcdef", "/?key="] {
            assert_eq!(judged("localhost", uri, ""), Visit::Unknown, "{uri}");
        }
    }

    #[test]
    fn a_key_lasts_for_the_boot_and_does_not_show() {
        let directory = tempfile::tempdir().unwrap();
        let key = Key::of(directory.path()).unwrap();
        assert_eq!(Key::of(directory.path()).unwrap(), key);
        assert_eq!(key.expose().len(), 32);
        assert_eq!(format!("{key:?} {:?}", access()).matches("0123").count(), 0);
        assert!(!format!("{:?}", access()).contains(&Key(KEY.into()).cookie()));
        let file = directory.path().join(KEY_FILE);
        let mode = std::os::unix::fs::PermissionsExt::mode(&std::fs::metadata(&file).unwrap().permissions());
        assert_eq!(mode & 0o777, 0o600);
        std::fs::write(&file, "short").unwrap();
        assert_ne!(Key::of(directory.path()).unwrap(), key);
    }
}
