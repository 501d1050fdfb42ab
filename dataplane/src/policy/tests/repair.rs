//! What others do to the table, and what the kernel refuses.

use nix::errno::Errno;

use super::super::live::Ownership;
use super::*;

#[test]
fn what_an_outsider_broke_is_repaired_and_what_is_his_is_left_alone() {
    let sabotages: &[&str] = &[
        "flush chain inet husk-policy forward",
        "delete rule inet husk-policy output handle $RULE",
        "replace rule inet husk-policy output handle $RULE accept",
        "insert rule inet husk-policy forward accept",
        "add rule inet husk-policy input counter drop",
        "flush chain inet husk-policy prerouting; delete chain inet husk-policy prerouting",
        "delete element inet husk-policy hosts4 { 192.0.2.1 }",
        "add element inet husk-policy hosts4 { 198.51.100.1 }",
        "delete element inet husk-policy ranges4 { 10.0.0.0-10.0.0.9 }",
        "add element inet husk-policy ranges4 { 10.1.0.1-10.1.0.6 }",
        "add element inet husk-policy ranges4 { 200.0.0.0-210.0.0.0 }",
        "add element inet husk-policy empty { ::-ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff }",
        "delete element inet husk-policy pods4 { 10.42.0.7 }; add element inet husk-policy pods4 { 10.42.0.7 : accept }",
        "delete element inet husk-policy pods4 { 10.42.0.8 }; add element inet husk-policy pods4 { 10.42.0.8 : continue }",
        "delete element inet husk-policy peers6 { fd42::7 }; add element inet husk-policy peers6 { fd42::7 : 1 }",
        "add element inet husk-policy pods4 { * : accept }",
        "add element inet husk-policy services { 9 . tcp . 1-2 : accept }",
        "flush set inet husk-policy ranges6",
        "flush map inet husk-policy services",
        "delete set inet husk-policy empty",
        "delete set inet husk-policy empty; add set inet husk-policy empty { type ipv4_addr; flags interval; }",
        "delete set inet husk-policy empty; add set inet husk-policy empty { type ipv6_addr; flags interval, timeout; timeout 5s; }",
        "delete map inet husk-policy nothing; add map inet husk-policy nothing { type ipv4_addr . ipv4_addr : mark; }",
        "add counter inet husk-policy mine",
        "add set inet husk-policy mine { type inet_service; elements = { 80 } }",
        "add map inet husk-policy mine { type ipv4_addr : verdict; elements = { 192.0.2.7 : jump pod } }",
        "add quota inet husk-policy mine { over 5 mbytes; }",
        "add chain inet husk-policy mine; add rule inet husk-policy mine accept",
        "add chain inet husk-policy mine; add rule inet husk-policy output jump mine",
        "add chain inet husk-policy mine; add chain inet husk-policy mine2; add rule inet husk-policy mine2 jump mine",
        "add chain inet husk-policy mine; add element inet husk-policy pods4 { 192.0.2.9 : jump mine }",
        "add rule inet husk-policy output ip saddr { 192.0.2.1, 192.0.2.2 } drop",
        "add chain inet husk-policy input { type filter hook input priority 10; policy drop; }",
        "delete chain inet husk-policy input; add chain inet husk-policy input { type filter hook input priority 7; }",
        "delete chain inet husk-policy input; add chain inet husk-policy input",
        "delete table inet husk-policy",
        "flush ruleset",
        "flush table inet husk-policy",
        "add table inet husk-policy { flags dormant; }",
    ];
    let foreign = "add table inet theirs; add table ip husk-policy; add chain inet theirs c { type filter hook input priority 0; }; \
                   add chain ip husk-policy c; add rule ip husk-policy c drop";
    in_namespace(|| {
        let table = everything();
        converge(&table);
        for sabotage in sabotages {
            nft(foreign);
            let theirs = || nft("list table inet theirs") + &nft("list table ip husk-policy");
            let before = theirs();
            let output = nft("list chain inet husk-policy output");
            let handle = output.lines().find(|line| line.contains("husk:")).unwrap().rsplit(' ').next().unwrap();
            nft(&sabotage.replace("$RULE", handle));
            let changes = converge(&table);
            assert!(!changes.is_empty(), "{sabotage}: nothing was found wrong");
            if !sabotage.contains("ruleset") {
                assert_eq!(theirs(), before, "{sabotage}");
                nft("delete table inet theirs; delete table ip husk-policy");
            }
            if sabotage.contains("$RULE") {
                assert!(matches!(changes.as_slice(), [PolicyChange::RebuildChain { .. }]), "{changes:?}");
            }
        }
    });
}

#[test]
fn a_refused_transaction_changes_nothing_in_force_and_says_what_was_refused() {
    in_namespace(|| {
        let table = everything();
        converge(&table);
        let mut live = Live::default();
        // What had come before the refused transaction stays, and nothing refers to it.
        let refused = |live: &mut Live, broken: &PolicyTable, left: &PolicyTable| {
            let changes = diff(Some(broken), live.read().unwrap().as_deref());
            let error = live.apply(&changes, Some(broken)).unwrap_err();
            is_as(left);
            assert_eq!(live.read().unwrap().as_deref(), Some(&ActualPolicy::of(left)));
            error
        };
        let mut broken = table.clone();
        broken.counters.insert("another".to_owned());
        let lost = PolicyMatch::In(PolicyField::Source(V4), "missing".into());
        broken.chains.insert("input".into(), chain(Some((Hook::Input, 10)), vec![rule(&[lost], act("accept"))]));
        let mut left = table.clone();
        left.counters.insert("another".to_owned());
        let error = refused(&mut live, &broken, &left);
        assert_eq!(error.errno(), Some(Errno::ENOENT));
        let expected =
            "the kernel refused to add rule 1 to chain input of nft table inet husk-policy: No such file or directory";
        assert_eq!(error.to_string(), expected);
        converge(&table);

        let mut broken = table.clone();
        let lost: Vec<(String, String)> =
            (0..200).map(|n| (format!("10.9.0.{n}"), if n == 123 { "jump lost" } else { "drop" }.to_owned())).collect();
        let lost: Vec<_> = lost.iter().map(|(key, value)| (key.as_str(), value.as_str())).collect();
        broken.sets.insert("pods4".into(), verdicts(PolicyKey::Address(V4), &lost));
        let error = refused(&mut live, &broken, &table).to_string();
        let expected = "the kernel refused to add elements to set pods4 of nft table inet husk-policy (10.9.0.123): No such file or directory";
        assert_eq!(error, expected);

        let mut broken = table.clone();
        broken.sets.insert("pods4".into(), verdicts(PolicyKey::Address(V4), &[("fd00::1", "drop")]));
        let error = refused(&mut live, &broken, &table).to_string();
        assert!(
            error.contains("add elements to set pods4") && error.contains("no element of a set of this type"),
            "{error}"
        );
    });
}

#[test]
fn the_table_is_read_again_only_when_others_have_changed_rules() {
    in_namespace(|| {
        let mut table = everything();
        let mut live = Live::default();
        let made = |live: &mut Live, table: &PolicyTable| {
            let changes = diff(Some(table), live.read().unwrap().as_deref());
            live.apply(&changes, Some(table)).unwrap();
            texts(&changes)
        };
        made(&mut live, &table);
        // What was never in the kernel comes from memory, also after a change of our own.
        let marked = ActualPolicy { counters: ["mark".to_owned()].into(), ..ActualPolicy::of(&table) };
        live.known.as_mut().unwrap().1 = Some(Arc::new(marked.clone()));
        assert_eq!(live.read().unwrap().as_deref(), Some(&marked));
        live.known.as_mut().unwrap().1 = Some(Arc::new(ActualPolicy::of(&table)));
        table.sets.insert("hosts4".into(), set(PolicyKey::Address(V4), &["192.0.2.2", "192.0.2.3"]));
        assert_eq!(made(&mut live, &table), ["set hosts4: delete 192.0.2.1", "set hosts4: add 192.0.2.3"]);
        let known = live.read().unwrap().unwrap();
        let Some(ActualSet::Ours(kept)) = known.sets.get("hosts4") else { panic!("{known:?}") };
        assert!(Arc::ptr_eq(kept, &table.sets["hosts4"]), "it was not read");
        is_as(&table);
        // A stranger's change of another table makes it be read, and so does one between reading and changing.
        nft("add table inet theirs");
        let read = live.read().unwrap().unwrap();
        let Some(ActualSet::Ours(read)) = read.sets.get("hosts4") else { panic!("{read:?}") };
        assert!(!Arc::ptr_eq(read, &table.sets["hosts4"]), "it was read");
        table.sets.insert("hosts4".into(), set(PolicyKey::Address(V4), &["192.0.2.4"]));
        let changes = diff(Some(&table), live.read().unwrap().as_deref());
        nft("add element inet husk-policy empty { fd00::1 }");
        live.apply(&changes, Some(&table)).unwrap();
        assert!(live.known.is_none());
        assert_eq!(made(&mut live, &table), ["set empty: delete fd00::1"]);
        is_as(&table);
    });
}

#[test]
fn a_table_that_is_not_as_it_was_thought_to_be_is_replaced_in_one_step() {
    in_namespace(|| {
        let mut table = everything();
        converge(&table);
        let mut live = Live::default();
        live.read().unwrap();
        table.sets.insert("hosts4".into(), set(PolicyKey::Address(V4), &["192.0.2.1", "192.0.2.2", "192.0.2.3"]));
        let changes = diff(Some(&table), live.read().unwrap().as_deref());
        nft("add element inet husk-policy hosts4 { 192.0.2.3 }");
        let applied = live.apply(&changes, Some(&table)).unwrap();
        assert!(applied.replaced && applied.bytes > 0);
        is_as(&table);
        assert_eq!(live.read().unwrap().as_deref(), Some(&ActualPolicy::of(&table)));
    });
}

#[test]
fn while_nothing_is_known_of_the_cluster_only_what_is_missing_is_made() {
    in_namespace(|| {
        let table = everything();
        let bare = self::table(
            &[],
            vec![],
            vec![("forward", chain(Some((Hook::Forward, -10)), vec![rule(&[], act("drop"))]))],
        );
        converge(&table);
        let withheld = || without_removals(diff(Some(&bare), read().unwrap().as_deref()));
        assert_eq!(withheld(), []);
        nft("flush chain inet husk-policy forward; delete chain inet husk-policy forward");
        assert_eq!(texts(&withheld()), ["add chain forward with 1 rules"]);
        let mut live = Live::default();
        live.read().unwrap();
        live.apply(&withheld(), Some(&bare)).unwrap();
        assert_eq!(read().unwrap().unwrap().sets.len(), table.sets.len());
        nft("delete table inet husk-policy");
        assert_eq!(texts(&withheld()), ["create with 1 chains, 0 sets with 0 elements"]);
        assert_eq!(without_removals(diff(None, Some(&ActualPolicy::of(&table)))), []);
    });
}

/// Flushing all rules, as firewalls do when they are restarted, leaves a table alone that belongs to somebody.
#[test]
fn a_table_that_belongs_to_a_process_outlives_it_and_what_others_flush() {
    in_namespace(|| {
        let table = everything();
        let mut live = Live::owning();
        let changes = diff(Some(&table), live.read().unwrap().as_deref());
        live.apply(&changes, Some(&table)).unwrap();
        if live.ownership == Ownership::Unwanted {
            // Before Linux 6.9: it is put back by whoever looks next.
            nft("flush ruleset");
            converge(&table);
            return;
        }
        nft("add table inet theirs");
        nft("flush ruleset");
        is_as(&table);
        assert!(!nft("list tables").contains("theirs"));
        let other = Live::default().apply(&[PolicyChange::DeleteTable], None).unwrap_err();
        assert_eq!(other.errno(), Some(Errno::EPERM));
        drop(live);
        is_as(&table);
        // The next one adopts it, and changes it.
        let mut next = Live::owning();
        let mut more = table.clone();
        more.counters.insert("another".to_owned());
        let changes = diff(Some(&more), next.read().unwrap().as_deref());
        assert_eq!(changes.len(), 1, "{changes:?}");
        next.apply(&changes, Some(&more)).unwrap();
        nft("flush ruleset");
        is_as(&more);
        // What nobody owns, since an older Husk made it, is replaced in one step.
        drop(next);
        Live::default().apply(&[PolicyChange::DeleteTable], None).unwrap();
        converge(&table);
        let mut owner = Live::owning();
        let changes = diff(Some(&table), owner.read().unwrap().as_deref());
        assert!(matches!(changes.as_slice(), [PolicyChange::ReplaceTable { .. }]), "{changes:?}");
        owner.apply(&changes, Some(&table)).unwrap();
        nft("flush ruleset");
        is_as(&table);
        // Whoever cleans up after the daemon has ended may.
        drop(owner);
        Live::default().apply(&[PolicyChange::DeleteTable], None).unwrap();
        assert_eq!(read().unwrap(), None);
    });
}
