/** The sidebar tab, as the front end keeps it. */

import { app } from "../../../scripts/app.js";

export const TAB = "switchyard";

/**
 * The store's copy of the tab: reading it in what the front end draws makes that depend on it, and
 * writing to it draws anew what does.
 *
 * @returns {{iconBadge: string | null, revision: number} | undefined}
 */
export function storedTab() {
    return app.extensionManager?.sidebarTab?.sidebarTabs?.find(({ id }) => id === TAB);
}
