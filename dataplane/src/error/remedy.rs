//! What helps against an error of the kernel.

use nix::errno::Errno;

use super::{Error, Refusal};

/// The remedy where an interface is not there.
const VANISHED: &str = "nothing, the interface vanished meanwhile and the next pass sees it";

/// The remedy where the reason is all that can be said.
const TRIED_AGAIN: &str = "the change is tried again every few seconds; if it stays, see the kernel's reason";

const PRIVILEGE: &str = "run as root, or with the capabilities NET_ADMIN and SYS_ADMIN";

impl Error {
    /// What a person should do about it, as an imperative clause. The error's text does not say it. The daemon's word, which
    /// tries again by itself.
    #[must_use]
    pub fn remedy(&self) -> &'static str {
        match self {
            Self::Refused(refusal) => refusal_remedy(refusal),
            Self::Socket { .. } | Self::Namespace { .. } | Self::File { .. } => {
                self.errno().map_or(TRIED_AGAIN, remedy)
            }
            Self::ProbeSocket { .. } => match self.errno() {
                Some(Errno::EADDRINUSE) => "stop the program that listens at this UDP port (`ss -ulnp`)",
                Some(errno) => remedy(errno),
                None => TRIED_AGAIN,
            },
            Self::Capture { .. } => match self.errno() {
                Some(Errno::EPERM | Errno::EACCES) => {
                    "capture as root, or with the capability CAP_NET_RAW; a container of Kubernetes lacks it, its node has it (docs/huskctl.md)"
                }
                Some(Errno::ENODEV | Errno::ENXIO) => {
                    "look for the interface with `ip link`; it may have gone just now"
                }
                Some(Errno::ENETDOWN) => "set the interface up with `ip link set ... up`, and capture again",
                Some(errno) => remedy(errno),
                None => TRIED_AGAIN,
            },
            Self::TimedOut { .. } => {
                "look for a process that holds the kernel's network lock (tasks in state D, `dmesg`); it is tried again"
            }
            Self::Interrupted { .. } => "find the program that rewrites it all the time and stop it",
            Self::Overrun { .. } => "nothing, it is read again; if it stays, raise net.core.rmem_max",
            Self::Malformed { .. } => "report it with the kernel's version, and that of nft if it is about nftables",
            Self::NotANamespace { .. } => {
                "remove the mount point that a namespace left behind, or correct the path of the namespace"
            }
            Self::Program { .. } => "see the program's words; the change is tried again every few seconds",
            Self::NoProgram { remedy, .. } | Self::Unsupported { remedy, .. } => remedy,
            Self::NoPrivateKey { .. } => {
                "look for why the daemon could not make or load the key, further up in its log"
            }
            Self::NoAssociationKey { .. } => {
                "nothing, a rotation replaces the association; if it stays, look for why the daemon has not the key of its epoch, \
                 further up in its log"
            }
            Self::WithTheOthers => "see the first of the changes that failed together",
            Self::Withheld { .. } => "mend what is named as the reason; the changes are then made within seconds",
            Self::WaitingForUserspaceDevice { .. } => {
                "nothing, it is tried again; if it stays, the log says why `huskd wireguard-userspace` does not start"
            }
        }
    }

    /// As [`Self::remedy`], from a program that does what it is told once, as the CNI plugin: it is up to its caller to try
    /// again.
    #[must_use]
    pub fn remedy_once(&self) -> &'static str {
        match self {
            Self::TimedOut { .. } => {
                "look for a process that holds the kernel's network lock (tasks in state D, `dmesg`), and try again"
            }
            Self::Overrun { .. } => "try again; if it stays, raise net.core.rmem_max",
            Self::Program { .. } => "see the program's words, and try again",
            _ => match self.remedy() {
                TRIED_AGAIN => "see the kernel's reason, and try again",
                VANISHED => "find out who deletes the interface, and try again",
                other => other,
            },
        }
    }
}

/// `EACCES` with an explanation is about the state of the object, for example an interface on which IPv6 is disabled.
fn refusal_remedy(refusal: &Refusal) -> &'static str {
    match (refusal.errno, &refusal.explanation) {
        (Errno::EACCES, Some(_)) => TRIED_AGAIN,
        (Errno::EACCES, None) => {
            "run as root, or with the capability NET_ADMIN; if it is about IPv6, see net.ipv6.conf.*.disable_ipv6"
        }
        (errno, _) => remedy(errno),
    }
}

/// What usually helps against an error number.
fn remedy(errno: Errno) -> &'static str {
    match errno {
        Errno::EPERM | Errno::EACCES => PRIVILEGE,
        Errno::EOPNOTSUPP | Errno::EPROTONOSUPPORT | Errno::EAFNOSUPPORT => {
            "load the kernel module of this feature, or use a kernel built with it"
        }
        Errno::ENOMEM | Errno::ENOBUFS => "free memory on this host",
        Errno::EMFILE | Errno::ENFILE => "raise the limit of open files (`ulimit -n`, fs.file-max)",
        Errno::ENODEV | Errno::ENXIO => VANISHED,
        Errno::EEXIST => "remove what somebody else made in its place, or give Husk another range",
        _ => TRIED_AGAIN,
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::refusal;
    use super::*;

    #[test]
    fn a_remedy_claims_a_missing_privilege_only_where_one_is_missing() {
        assert!(refusal(Errno::EPERM, None).remedy().contains("NET_ADMIN"));
        assert!(refusal(Errno::EACCES, None).remedy().contains("disable_ipv6"));
        let disabled = refusal(Errno::EACCES, Some("IPv6 is disabled on this device"));
        assert!(!disabled.remedy().contains("root"), "{}", disabled.remedy());
        let file =
            |errno: Errno| Error::File { operation: "write", path: "/proc/sys/net/x".into(), source: errno.into() };
        assert!(file(Errno::EACCES).remedy().contains("run as root"));
        assert!(refusal(Errno::ENODEV, None).remedy().contains("vanished"));
    }

    #[test]
    fn every_error_has_a_remedy_that_its_text_does_not_repeat() {
        let (operation, object, reason) = ("read", "x".to_owned(), "y".to_owned());
        let all = [
            refusal(Errno::EPERM, None),
            refusal(Errno::EINVAL, Some("why")),
            Error::Socket { operation, protocol: "NETLINK_ROUTE", source: Errno::EPERM.into() },
            Error::ProbeSocket { operation, address: ([192, 0, 2, 1], 4875).into(), source: Errno::EADDRINUSE.into() },
            Error::Capture { operation, interface: object.clone(), source: Errno::EPERM.into() },
            Error::TimedOut { operation, object: object.clone(), seconds: 10 },
            Error::Interrupted { operation, object: object.clone(), attempts: 8 },
            Error::Overrun { operation, object: object.clone() },
            Error::Malformed { operation, object: object.clone(), reason: reason.clone() },
            Error::Namespace { operation, path: object.clone(), source: Errno::EPERM.into() },
            Error::NotANamespace { path: object.clone(), found: "a directory" },
            Error::File { operation, path: "/z".into(), source: Errno::EACCES.into() },
            Error::Program { operation, object: object.clone(), program: "nft", reason: reason.clone() },
            Error::NoProgram { operation, object: object.clone(), program: "nft", remedy: "install it" },
            Error::Unsupported { operation, object: object.clone(), reason: reason.clone(), remedy: "load it" },
            Error::NoPrivateKey { interface: object.clone() },
            Error::NoAssociationKey { association: object.clone(), reason: reason.clone() },
            Error::WithTheOthers,
            Error::Withheld { withheld: object.clone(), missing: "the table", reason },
            Error::WaitingForUserspaceDevice { interface: object },
        ];
        for error in all {
            assert!(!error.remedy().is_empty(), "{error}");
            assert!(!error.to_string().contains(error.remedy()), "{error}");
        }
    }

    #[test]
    fn who_does_not_try_again_does_not_say_so() {
        let (operation, object) = ("read", "x".to_owned());
        for error in [
            refusal(Errno::EINVAL, Some("why")),
            refusal(Errno::ENODEV, None),
            Error::TimedOut { operation, object: object.clone(), seconds: 10 },
            Error::Overrun { operation, object: object.clone() },
            Error::File { operation, path: "/z".into(), source: Errno::EIO.into() },
            Error::Program { operation, object, program: "nft", reason: "y".to_owned() },
        ] {
            let said = error.remedy_once();
            let promised = ["every few seconds", "next pass", "is tried again", "is read again"];
            assert!(promised.iter().any(|it| error.remedy().contains(it)), "{error}: {}", error.remedy());
            assert!(!promised.iter().any(|it| said.contains(it)) && said.contains("try again"), "{error}: {said}");
        }
        assert_eq!(refusal(Errno::EPERM, None).remedy_once(), PRIVILEGE);
    }
}
